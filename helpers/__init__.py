"""What every lesson of the course needs and no lesson teaches, and the tools to take home.

Read the modules in this order: `data`, `model`, `device` (what goes in), `events`, `measure` (one
run under observation), `catalog`, `compare`, `plots`, `explore`, `exercise` (what comes out). Then
`baseline` and `optimized`, the same job twice; `ceiling`, `peers` and `report`, which compare them;
`doctor`, which reads pipelines of your own. `python -m helpers --help` lists the commands.
"""

"""What every lesson of the course needs and no lesson teaches.

Read the modules in this order: `data`, `model`, `device` (what goes in), `events`, `measure` (one
run under observation), `catalog`, `compare`, `plots`, `exercise` (what comes out).
"""

"""The doctor: reads your own Ray Data pipeline and names the mistakes it finds.

    from helpers import doctor

    doctor.diagnose(dataset)              # from the plan, and from its statistics if it has run
    doctor.diagnose(dataset, run=True)    # runs it once, under observation
    with doctor.watch() as seen:          # whatever runs in here, with every execution
        ...
    seen.diagnosis()

In a terminal: `python -m helpers doctor my_script.py [its arguments]`; the script runs unchanged.

Three sources, in this order: the plan that Ray Data executes, the statistics of its operators, and
the text of the functions that were handed to it. It observes: it neither changes a setting nor runs
anything a second time. One exception: an execution that waits for a GPU or CPU which this machine
does not have would wait for half an hour; it is ended after some seconds.

How it goes: `observe` looks on while Ray Data runs, `plan` turns what it sees into an `execution`,
`code` reads functions, `rules` judges (one module for each family of mistakes; when in doubt it
stays silent), `report` shows the findings, `command` is the command line.
"""

from helpers.doctor.observe import diagnose as diagnose
from helpers.doctor.observe import watch as watch
from helpers.doctor.report import Diagnosis as Diagnosis
from helpers.doctor.report import Finding as Finding

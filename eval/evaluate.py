"""Scores a pipeline or student folder under a named protocol and writes a report: `fastdiff evaluate` as a script.

python eval/evaluate.py runs/demo/student --output runs/demo/report
"""

import sys

from fastdiff.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))

"""Search hyper-parameters on the validation split: `python sweep.py sweep=deit_distilled` (see conf/sweep.yaml).

    python sweep.py sweep=NAME [sweep.trials=50] [n_workers=2] [any override of train.py]

The same command goes on where an interrupted sweep ended. `facemask sweep show NAME` shows it, `facemask sweep finish
NAME` trains the best parameters with fresh seeds and opens the test split, `optuna-dashboard STORAGE` (pip install
optuna-dashboard) follows it in a browser. The sweeps there are: conf/sweep/*.yaml; the options: conf/sweep/_base.yaml.
"""

import sys

from facemask.config import stop

if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        sys.exit()
    try:
        from facemask.sweep import main

        main(sys.argv[1:])
    except Exception as error:
        stop(error)

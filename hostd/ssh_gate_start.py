"""The gate as a forced command, at the least cost: ``python3 -I -S …/hostd/ssh_gate_start.py --peer NAME``.

A file of its own, because Python compiles the script that it is given anew each time, and keeps only what is imported.
"""

import os
import sys

if __name__ == "__main__":
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

    from hostd.ssh_gate import main

    sys.exit(main())

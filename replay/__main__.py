"""`python -m replay`"""

from replay.cli import main

main(prog_name="iccache-replay")

"""python -m iccache"""

from iccache.cli import main

if __name__ == "__main__":
    main()

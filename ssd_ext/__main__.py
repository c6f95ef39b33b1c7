"""``python -m ssd_ext`` is the command ``ssd_ext``."""

from ssd_ext.cli import main

if __name__ == "__main__":
    main()

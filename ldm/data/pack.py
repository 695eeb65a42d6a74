"""`python -m ldm.data.pack`, see ldm/data/shards/pack.py."""

import sys

from ldm.data.shards.pack import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m ldm.data.index`, see ldm/data/shards/index.py."""

import sys

from ldm.data.shards.index import main

if __name__ == "__main__":
    sys.exit(main())

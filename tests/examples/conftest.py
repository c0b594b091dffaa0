import sys
from pathlib import Path

# The examples import one another as siblings, as they do when run as scripts.
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

"""Run outside of the checkout: the installed package is the wheel's, and has its data.

python tests/house/installed.py ENVIRONMENT
"""

import sys
from pathlib import Path

import flexprefill
from flexprefill import search_blocks
from flexprefill.evaluation.real_heads import REAL_LENGTH, load_heads

package = Path(flexprefill.__file__).parent
assert package.is_relative_to(Path(sys.argv[1]).resolve()), f"{package} is not what was installed"
for name in ("py.typed", "viewer/page.html", "viewer/page.css", "evaluation/smollm2_heads.NOTICE"):
    assert (package / name).is_file(), f"{name} is not in the wheel"
assert list((package / "viewer").glob("*.js")), "the viewer's scripts are not in the wheel"
query, key, _ = load_heads(REAL_LENGTH, "cpu")
assert 0 < search_blocks(query, key).density().mean() < 1

"""The API reference lists what is public."""

import importlib
import re
from pathlib import Path

import pytest

REFERENCE = Path(__file__).parent.parent / "docs" / "reference"
MODULES = {
    "fimkit": "fimkit",
    "functional": "fimkit.functional",
    "influence": "fimkit.influence",
    "losses": "fimkit.losses",
    "operators": "fimkit.operators",
}


def listed(page):
    """Return the names in a page's summaries."""
    text = (REFERENCE / f"{page}.rst").read_text()
    summaries = re.findall(r"^\.\. autosummary::\n((?:[ ]{3}.*\n|\n)+)", text, re.MULTILINE)
    return re.findall(r"^ {3}(\w+)$", "".join(summaries), re.MULTILINE)


@pytest.mark.skipif(not REFERENCE.exists(), reason="docs/ is not here")
@pytest.mark.parametrize("page", MODULES)
def test_every_public_name_is_listed_once(page):
    module = importlib.import_module(MODULES[page])
    # An error that fimkit itself has is described there alone.
    elsewhere = {"IFVPUsageError"} if page == "functional" else set()
    assert sorted(listed(page)) == sorted(set(module.__all__) - elsewhere)


@pytest.mark.skipif(not REFERENCE.exists(), reason="docs/ is not here")
def test_every_page_is_compared_and_in_the_contents():
    pages = {path.stem for path in REFERENCE.glob("*.rst")} - {"index"}
    assert pages == set(MODULES)
    contents = (REFERENCE / "index.rst").read_text()
    assert all(re.search(rf"^   {page}$", contents, re.MULTILINE) for page in pages)

"""What MkDocs calls while it builds the site: generated pages join the written ones."""

from __future__ import annotations

import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent.parent))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the reference."""
    from docs.generated import PAGES

    for path, page in PAGES.items():
        files.append(File.generated(config, path, content=page()))
    return files

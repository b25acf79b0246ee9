"""A page that draws what the models here can do, in a browser of the same machine."""

from __future__ import annotations

import os
from importlib.util import find_spec

from ..runtime.errors import UserError
from .entry import entry
from .flags import Flags
from .tool_sections import PageConfig


def show(flags: Flags) -> None:
    """Serve the page until it is interrupted."""
    flags.check()
    if find_spec("gradio") is None:
        raise UserError("the page needs gradio: pip install 'guided-diffusion[demo]', in a checkout '.[demo]'")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    from . import page_view

    page_view.serve(flags.part(PageConfig))


main = entry("page", show)

"""Networks of the library transformers from a local folder, read without the internet and without code of the folder.

Whatever is wrong with a folder is raised as some error of the library's, which the callers turn into a sentence.
"""

from __future__ import annotations

import os
from typing import Any

import torch as th

from .errors import as_user_error, refuse

OPTIONS: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def open_folder(folder: str, extra: str) -> tuple[Any, Any]:
    """The library and the config in a folder.

    :param extra: of this package, which brings the library.
    """
    refuse((not os.path.isdir(folder), "there is no such folder"))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns when a process forks after its threads
    with as_user_error(f'transformers is missing: run `pip install "guided-diffusion[{extra}]"`', ImportError):
        import transformers
    return transformers, transformers.AutoConfig.from_pretrained(folder, **OPTIONS)


def read_network(library: Any, loader: str, folder: str, config: Any, *, spare: str = "") -> Any:
    """The network of a folder in float32, frozen and in evaluation mode; one that lacks tensors is refused.

    :param loader: the class of the library that reads it.
    :param config: of the network, which may be a part of that of the folder.
    :param spare: part of the names of tensors that may be missing.
    """
    reading: dict[str, Any] = {"dtype": th.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    level, shows_bar = library.logging.get_verbosity(), library.logging.is_progress_bar_enabled()
    library.logging.set_verbosity_error()  # or every tensor of the other part of CLIP would be listed
    library.logging.disable_progress_bar()
    try:
        network, info = getattr(library, loader).from_pretrained(folder, config=config, **reading, **OPTIONS)
    finally:
        library.logging.set_verbosity(level)
        if shows_bar:
            library.logging.enable_progress_bar()
    missing = sorted(name for name in info["missing_keys"] if not spare or spare not in name)
    faults = [*missing, *(name for name, *_ in info["mismatched_keys"])]  # which the library draws at random
    first = "".join(faults[:1])
    refuse((faults, f"{len(faults)} of its tensors are missing or of another shape, the first is {first}"))
    return network.eval().requires_grad_(False)

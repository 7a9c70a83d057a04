"""Entry point of `hf-he`. Importing any module of the package registers its models with transformers, which loads torch (seconds).

So hf_he/cli.py, whose own imports are light, is loaded from its file: `hf-he --help` and shell completion stay instant.
"""

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path


def main() -> None:
    path = Path(find_spec("hf_he").origin).with_name("cli.py")
    spec = spec_from_file_location("hf_he_cli_commands", path)
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.main()

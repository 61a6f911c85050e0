"""A child of `fake_driver`: runs one test's body. Usage: fake_driver_child.py MODULE NAME"""

import importlib
import sys
import types
from pathlib import Path

# The package without its `__init__`, which would start the driver to look for a GPU.
package = types.ModuleType("tests")
package.__path__ = [str(Path(__file__).parent)]
sys.modules["tests"] = package

if __name__ == "__main__":
    module, name = sys.argv[1:]
    importlib.import_module(module)
    importlib.import_module("tests.fake_driver").run_body(name)

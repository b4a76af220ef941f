import importlib
import pkgutil

import moescope.tracer


def test_no_public_name_is_hidden_by_a_module_once_it_is_imported():
    modules = {module.name for module in pkgutil.iter_modules(moescope.tracer.__path__)}
    assert modules.isdisjoint(moescope.tracer.__all__)
    for name in moescope.tracer.__all__:
        assert callable(getattr(importlib.import_module("moescope.tracer"), name))

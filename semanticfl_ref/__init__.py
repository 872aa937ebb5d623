"""SemanticFL: federated learning guided by a frozen diffusion model, as a compact reference.

The names below are the public API (docs/api.md). Each is imported when it is first used, so that
`import semanticfl_ref` is instant.
"""

import importlib

__version__ = "0.1.0"

_MODULE_OF = {
    "Config": "config.settings",
    "Section": "config.schema",
    "option": "config.schema",
    "resolve": "config.resolve",
    "register_dataset": "config.registry",
    "register_method": "config.registry",
    "register_model": "config.registry",
    "register_scenario": "config.registry",
    "Dataset": "data.dataset",
    "Partition": "data.partition",
    "Anchors": "diffusion.anchors",
    "Method": "federated.methods.method",
    "ClientModel": "federated.model",
    "RunData": "run.setup",
    "load_data": "run.setup",
    "build_anchors": "run.setup",
    "RunFolder": "run.folder",
    "train": "run.train",
    "resume": "run.train",
    "TrainedModel": "run.trained",
    "load_model": "run.trained",
    "export_model": "run.trained",
}
__all__ = [*_MODULE_OF, "__version__"]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'semanticfl_ref' has no attribute {name!r}")
    module = importlib.import_module(f"semanticfl_ref.{_MODULE_OF[name]}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

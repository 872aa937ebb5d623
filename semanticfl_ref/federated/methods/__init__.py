"""The table of methods. One file each; a further method is one file that calls `add_method`.

| method | adds to the local loss | corrects the gradient | keeps | weighs by |
| --- | --- | --- | --- | --- |
| fedavg | | | | images |
| fedprox | mu/2 distance to the model received, squared | | | images |
| scaffold | | c - c_i | controls [M, P], [P] | images |
| moon | contrast: towards the model received, away from the last own | | last own rows [M, P] |
images | | fedrcl | supervised contrast and divergence penalty, at every level | | | images | |
feddisco | | | | images and label discrepancy | | fedcda | | | last own rows [M, memory, P] |
images, of the least divergent rows | | feddifrc | consistency and contrast with diffusion features
| | | images | | semanticfl | consistency and contrast with diffusion anchors | | | images |"""

from semanticfl_ref import config
from semanticfl_ref.errors import UserError
from semanticfl_ref.federated.methods.fedavg import FEDAVG
from semanticfl_ref.federated.methods.fedcda import FEDCDA
from semanticfl_ref.federated.methods.feddifrc import FEDDIFRC
from semanticfl_ref.federated.methods.feddisco import FEDDISCO
from semanticfl_ref.federated.methods.fedprox import FEDPROX
from semanticfl_ref.federated.methods.fedrcl import FEDRCL
from semanticfl_ref.federated.methods.method import Method
from semanticfl_ref.federated.methods.moon import MOON
from semanticfl_ref.federated.methods.scaffold import SCAFFOLD
from semanticfl_ref.federated.methods.semanticfl import SEMANTICFL

METHODS: dict[str, Method] = {
    "fedavg": FEDAVG,
    "fedprox": FEDPROX,
    "scaffold": SCAFFOLD,
    "moon": MOON,
    "fedrcl": FEDRCL,
    "feddisco": FEDDISCO,
    "fedcda": FEDCDA,
    "feddifrc": FEDDIFRC,
    "semanticfl": SEMANTICFL,
}


def add_method(name: str, method: Method, section: type[config.Section] | None = None) -> None:
    """Add a method from outside the package: `--method name` works from then on, in this process.

    Args:
        name: what the user writes.
        section: a frozen dataclass of `schema.option` fields, its own settings; they appear as
            `name.field`. Call the class as the method, in any case.

    Raises:
        UserError: the name is taken.
    """
    if name in METHODS:
        raise UserError(f"add_method({name!r}): there is a method of that name; take another")
    config.add_method(name, section)
    METHODS[name] = method

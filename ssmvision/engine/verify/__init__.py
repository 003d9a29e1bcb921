"""Proof of a conversion: our code with official weights against what the official code computed.

A case is a folder:

    ckpt.safetensors   weights under the official key names, where there are any
    io.safetensors     input[.N], output[.N], feat.N[.M], grad_input, grad.<official key>, and what else a family has
    meta.json          family, official_class, kwargs (of the official constructor), tolerance {rtol, atol},
                       grad_tolerance {rtol, atol_rel_to_max}, output_absmax (features larger than the output are
                       allowed proportionally more), feats (official module names, in the order of feat.N)

Gradients of networks are those of the sum over outputs of output.pow(2).mean(), in eval mode.
"""

from pathlib import Path

from ssmvision.data import UserError
from ssmvision.engine.verify.case import Case, read_case
from ssmvision.engine.verify.compare import Verification, compare
from ssmvision.engine.verify.mamba_layers import CHECKS as MAMBA_LAYERS
from ssmvision.engine.verify.modules import Check
from ssmvision.engine.verify.networks import verify_network
from ssmvision.engine.verify.operators import CHECKS as OPERATORS
from ssmvision.engine.verify.s5 import CHECKS as S5
from ssmvision.engine.verify.spacetime import CHECKS as SPACETIME
from ssmvision.engine.verify.structured import CHECKS as STRUCTURED
from ssmvision.engine.verify.video import CHECKS as VIDEO

# What is no whole network, by family.
CHECKS = {**OPERATORS, **STRUCTURED, **S5, **SPACETIME, **MAMBA_LAYERS, **VIDEO}

__all__ = ["Verification", "verify_case"]


def verify_case(folder: Path) -> Verification:
    """Build ours from the official arguments, load the weights strictly and compare everything.

    Args:
        folder: The case.

    Raises:
        UserError: The folder is not a case, or its family is not one of ours.
    """
    case = read_case(folder)
    try:
        return _verify_part(case, CHECKS[case.family]) if case.family in CHECKS else verify_network(case)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged case leads to, the cases after it are to be verified
        return Verification(case.name, {}, f"cannot be compared: {type(error).__name__}: {error}".splitlines()[0])


def _verify_part(case: Case, check: Check) -> Verification:
    try:
        found, wanted = check.compute(case)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        return Verification(case.name, {}, f"cannot be built: {error}")
    result = compare(case.name, found, wanted, case.meta)
    return result.with_overlooked(*case.overlooked(wanted, check.given))

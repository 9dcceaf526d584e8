"""Contract suites for models and engines, ours and third parties'.

A suite is a list of checks. Each takes a case and raises ``AssertionError`` that says what is
broken; :func:`model_checks` and :func:`engine_checks` pick those that the case calls for::

    case = ModelCase("mine", MyModel().bind(data), data, draws)

    @pytest.mark.parametrize("check", model_checks(case), ids=lambda check: check.__name__)
    def test_contract(check):
        check(case)

Statistical checks fail a correct model less than once in ten thousand times; seeds are fixed.
"""

from __future__ import annotations

from collections.abc import Callable

from bayesgen.capabilities import Conditional, Encoder, Generative, Program, Scored, Symmetric
from bayesgen.testing.cases import EngineCase, ModelCase
from bayesgen.testing.densities import (
    check_missing,
    check_normalised,
    check_pure,
    check_rowwise,
    check_sample_entropy,
    check_samples,
    check_shapes,
)
from bayesgen.testing.engines import (
    check_callback,
    check_diagnosed,
    check_fit,
    check_globals,
    check_monotone,
    check_reproducible,
    check_resume,
    check_saved,
)
from bayesgen.testing.structure import (
    check_condition,
    check_config,
    check_description,
    check_encode,
    check_program,
    check_symmetry,
)

__all__ = ["EngineCase", "ModelCase", "engine_checks", "model_checks"]


def model_checks(case: ModelCase) -> list[Callable[[ModelCase], None]]:
    """The checks that the capabilities of the case's model call for."""
    checks: list[Callable[[ModelCase], None]] = [check_description, check_config]
    narrow = case.data.num_columns <= 2
    if isinstance(case.model, Scored):
        checks += [check_shapes, check_missing, check_rowwise, check_pure]
        checks += [check_normalised] if narrow else []
        checks += [check_samples] if isinstance(case.model, Generative) else []
        checks += [check_sample_entropy] if narrow and isinstance(case.model, Generative) else []
        # Only a density in closed form is that of a program without its local latents.
        exact = case.program_sites and not case.model.is_estimated
        checks += [check_program] if exact and isinstance(case.model, Program) else []
        checks += [check_condition] if isinstance(case.model, Conditional) else []
    if isinstance(case.model, Encoder):
        checks.append(check_encode)
    if isinstance(case.model, Symmetric):
        checks.append(check_symmetry)
    return checks


def engine_checks(case: EngineCase) -> list[Callable[[EngineCase], None]]:
    """The checks that the case calls for."""
    checks: list[Callable[[EngineCase], None]] = [
        check_fit,
        check_reproducible,
        check_globals,
        check_saved,
        check_diagnosed,
    ]
    checks += [check_resume, check_callback] if case.resume_after else []
    return [*checks, check_monotone] if case.monotone else checks

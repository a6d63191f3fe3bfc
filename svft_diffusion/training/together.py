"""Work that one of several processes does before the others, so that all go on or all end."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import Accelerator

from svft_diffusion.errors import Interrupted, UserError

Result = TypeVar("Result")
_GOES_ON, _FAILED = -1, -2


def first_process_first(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """What ``work`` returns, which the other processes call when the first has done it.

    Raises:
        Interrupted: in every process, if the first was asked to end.
        UserError: in the others, if the first failed; there, what ``work`` raised.
    """
    if accelerator.num_processes == 1:
        return work()
    outcome = _GOES_ON
    error: BaseException | None = None
    result: Result | None = None
    if accelerator.is_main_process:
        try:
            result = work()
        except Interrupted as request:
            outcome, error = request.exit_code, request
        except Exception as problem:
            outcome, error = _FAILED, problem
    told = accelerator.gather(torch.tensor([outcome], device=accelerator.device))
    outcome = int(told[0])
    if error is not None:
        raise error
    if outcome == _FAILED:
        raise UserError("the first of the processes could not go on, and says why")
    if outcome != _GOES_ON:
        raise Interrupted(outcome)
    return work() if result is None else result

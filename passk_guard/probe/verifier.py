"""Reward functions written for TRL -> correct or not, for each sample."""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence, Set
from contextlib import suppress
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from passk_guard.probe.records import Outcomes, Rollouts
from passk_guard.probe.timeouts import Aside, Overdue, TimeLimit, raised_by_a_signal
from passk_guard.utils.errors import FailedRefresh, GuardError
from passk_guard.utils.text import brief, describe_error, one_line

RewardFunction = Callable[..., Any]
_STANDARD = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
_NOT_COLUMNS = ("prompt", "completion", "completion_ids")
_NO_LIST = (str, bytes, Mapping, Set)  # none of them holds one reward a completion, in order


class Verifier:
    """Decide for each sample whether it is correct: reward >= threshold is 1, less is 0, None and NaN are no verdict.

    Args:
        function: a reward function with TRL's signature, f(prompts, completions, completion_ids, **columns) ->
            one float, bool or None a sample; sync or async. Without **kwargs it is passed only what it names.
        threshold: rewards from here on count as correct; compared in float32, as TRL keeps rewards.
        timeout: seconds in which the samples of one refresh must be scored, see `TimeLimit`; None or 0 for no limit.

    Attributes:
        partial: the largest reward so far that is above 0 and counts as wrong, if there was one.

    Raises:
        GuardError: `function` is a reward model or not callable, or `threshold` is not a finite number.
    """

    def __init__(self, function: RewardFunction, *, threshold: float = 1.0, timeout: float | None = None) -> None:
        if isinstance(function, nn.Module):
            raise GuardError(
                f"Expected a function that checks an answer; found the reward model {type(function).__name__}, "
                "whose score is no verdict. Wrap it in a function that returns 1.0 where the score passes your "
                "threshold, else 0.0."
            )
        if not callable(function):
            raise GuardError(
                f"Expected a reward function f(prompts, completions, completion_ids, **columns); found "
                f"{type(function).__name__}. Pass a function, or the name of one of the trainer's."
            )
        if not math.isfinite(threshold):
            raise GuardError(f"Expected a finite `threshold`; found {threshold}.")
        self.function = function
        self.threshold = float(threshold)
        self.name = one_line(_name(function))
        self.partial: float | None = None
        self._limit = TimeLimit(timeout)
        self._accepted, self.required_columns = _read_signature(function)

    def score(self, rollouts: Rollouts, *, trainer_state: Any = None) -> Outcomes:
        """Call the function on all B samples at once; if that raises, sample by sample.

        Fillers (prompt_index -1) and what is `lost` are not scored. The function gets copies of rows and completions.

        Args:
            rollouts: B samples.
            trainer_state: passed on to functions that take it.

        Returns:
            Outcomes with correct [B].

        Raises:
            FailedRefresh: the function raised on every sample, did not come back in time, or returned something else
                than one number or None a sample; or all samples are lost.
        """
        asked = [i for i, prompt in enumerate(rollouts.prompt_index) if prompt >= 0]
        scored = [i for i in asked if i not in rollouts.lost]
        lost = [rollouts.lost[i] for i in asked if i in rollouts.lost]
        rewards = [math.nan] * len(rollouts)
        if lost and not scored:
            raise FailedRefresh(f"{lost[0]}, and so each of {len(lost)}")
        if not scored:
            return self.outcomes(rewards)
        try:
            given, failures, reason = self._limit.call(lambda: self._call(rollouts, scored, trainer_state))
        except Overdue as late:
            raise FailedRefresh(f"`{self.name}` {late}") from None
        for i, reward in zip(scored, given, strict=True):
            rewards[i] = reward
        reason = "; ".join(filter(None, [*lost[:1], reason])) or None
        return self.outcomes(rewards, failures=failures + len(lost), reason=reason)

    def outcomes(self, rewards: Sequence[float] | Tensor, *, failures: int = 0, reason: str | None = None) -> Outcomes:
        """Compare rewards [B], NaN for none, with the threshold; `failures` and `reason` are passed through."""
        values = torch.as_tensor(rewards, dtype=torch.float32).detach().cpu()
        known = ~values.isnan()
        correct = torch.where(known, (values >= self.threshold).to(torch.int8), torch.tensor(-1, dtype=torch.int8))
        best = values[known].max().item() if known.any() else None
        between = values[(values > 0) & (values < self.threshold)]
        if between.numel():
            self.partial = max(self.partial or 0.0, between.max().item())
        return Outcomes(correct=correct, failures=failures, reason=reason, best_reward=best, rewards=values)

    def _call(self, rollouts: Rollouts, scored: list[int], trainer_state: Any) -> tuple[list[float], int, str | None]:
        """Rewards of the samples in `scored`, how many of them raised, and the first reason."""
        [result] = _settle([self._attempt(rollouts, scored, trainer_state)])
        if not isinstance(result, BaseException):
            return self._numbers(result, len(scored)), 0, None
        # One bad completion must not fail the others: find out which.
        results = _settle([self._attempt(rollouts, [i], trainer_state) for i in scored])
        errors = [describe_error(r) for r in results if isinstance(r, BaseException)]
        if len(errors) == len(results):
            raise FailedRefresh(f"`{self.name}` raised on each of {len(results)} samples, first {errors[0]}")
        rewards = [math.nan if isinstance(r, BaseException) else self._numbers(r, 1)[0] for r in results]
        return rewards, len(errors), errors[0] if errors else None

    def _attempt(self, rollouts: Rollouts, picked: list[int], trainer_state: Any) -> Any:
        """What the function returns, or the exception it raises."""
        try:
            return self.function(**self._arguments(rollouts, picked, trainer_state))
        except (Exception, SystemExit) as error:
            if isinstance(error, SystemExit) and raised_by_a_signal(error):
                raise  # the user's SIGTERM handler may end the run in this way
            return error.with_traceback(None)  # whose frames would keep this refresh alive until garbage collection

    def _numbers(self, result: Any, expected: int) -> list[float]:
        """`expected` rewards as floats, None as NaN."""

        def refused(found: str) -> FailedRefresh:
            wanted = f"expected a list of {expected}, one float, bool or None a completion"
            return FailedRefresh(f"`{self.name}` returned {found}; {wanted}")

        try:
            rewards = None if isinstance(result, _NO_LIST) else list(islice(result, expected + 1))  # it may have no end
        except TypeError:  # no iterable
            rewards = None
        if rewards is None:
            raise refused(f"{type(result).__name__} {brief(result)}")
        if len(rewards) != expected:
            raise refused(f"{len(result) if hasattr(result, '__len__') else len(rewards)} rewards")
        numbers = []
        for reward in rewards:
            try:
                numbers.append(math.nan if reward is None else _number(reward))
            except (TypeError, ValueError, RuntimeError, OverflowError):
                raise refused(f"a reward {brief(reward)} of type {type(reward).__name__}") from None
        return numbers

    def _arguments(self, rollouts: Rollouts, picked: list[int], trainer_state: Any) -> dict[str, Any]:
        rows = [copy.deepcopy(dict(rollouts.rows[i])) for i in picked]
        names = dict.fromkeys(name for row in rows for name in row if name not in _NOT_COLUMNS)
        arguments: dict[str, Any] = {name: [row.get(name) for row in rows] for name in names}
        arguments |= {name: [values[i] for i in picked] for name, values in rollouts.columns.items()}
        arguments |= {
            "prompts": [row["prompt"] for row in rows],
            "completions": [copy.deepcopy(rollouts.completions[i]) for i in picked],
            "completion_ids": [list(rollouts.completion_ids[i]) for i in picked],
            "trainer_state": trainer_state,
            "log_extra": _log_nothing,
            "log_metric": _log_nothing,
        }
        if self._accepted is None:
            return arguments
        return {name: value for name, value in arguments.items() if name in self._accepted}


def resolve_verifier(
    correct: RewardFunction | Verifier | str | None,
    reward_funcs: Sequence[Any] = (),
    reward_func_names: Sequence[str] = (),
    *,
    threshold: float = 1.0,
    timeout: float | None = None,
) -> Verifier:
    """Find the verifier that the user means.

    Args:
        correct: a reward function, a Verifier (returned as it is), or the name of a reward function of the trainer.
        reward_funcs, reward_func_names: the trainer's, in the same order.
        threshold, timeout: for a new Verifier.

    Raises:
        GuardError: none; no reward function, or more than one, has that name; or what it names is not a function.
    """
    if correct is None:
        raise GuardError(
            "Expected `correct`, the reward function that means a correct answer; found none. Pass the function"
            + (f", or the name of one of the trainer's: {list(reward_func_names)}." if reward_func_names else ".")
        )
    if isinstance(correct, Verifier):
        return correct
    if not isinstance(correct, str):
        return Verifier(correct, threshold=threshold, timeout=timeout)
    named = [f for f, name in zip(reward_funcs, reward_func_names, strict=True) if name == correct]
    if len(named) != 1:
        known = ", ".join(map(repr, reward_func_names)) or "none"
        raise GuardError(
            f"Expected `correct` to name one of the trainer's reward functions ({known}); found {correct!r}, which "
            f"names {len(named)}. Pass one of these names, or the function itself."
        )
    return Verifier(named[0], threshold=threshold, timeout=timeout)


def _read_signature(function: RewardFunction) -> tuple[frozenset[str] | None, tuple[str, ...]]:
    """Names the function accepts (None: all, it has **kwargs), and the dataset columns it needs."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None, ()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = tuple(p.name for p in named if p.default is p.empty and p.name not in _STANDARD)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return None if open_ended else frozenset(p.name for p in named), required


def _name(function: Any) -> str:
    """The name TRL gives a reward function: partials unwrapped, instances by their class."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", None) or type(function).__name__


def _settle(results: list[Any]) -> list[Any]:
    """Await the coroutines among the results together; exceptions are returned in their places."""
    pending = [i for i, result in enumerate(results) if inspect.isawaitable(result)]
    if not pending:
        return results

    async def gather() -> list[Any]:
        return await asyncio.gather(*(_wait(results[i]) for i in pending), return_exceptions=True)

    settled = dict(zip(pending, _run(gather()), strict=True))
    return [settled.get(i, result) for i, result in enumerate(results)]


async def _wait(awaitable: Any) -> Any:
    try:
        return await awaitable
    except (asyncio.CancelledError, SystemExit) as error:  # not subclasses of Exception: they would end training
        raise RuntimeError(f"the reward call ended with {type(error).__name__}") from error


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run to the end in a separate loop and thread: a notebook already runs a loop in this one."""
    task: list[tuple[asyncio.AbstractEventLoop, Any]] = []

    async def main() -> Any:
        task.append((asyncio.get_running_loop(), asyncio.current_task()))
        return await coroutine

    aside = Aside(lambda: asyncio.run(main()))
    try:
        return aside.result()
    finally:
        if aside.running:  # its time is up, or the user has stopped the run
            for loop, running in task:
                with suppress(RuntimeError):  # the loop has ended by now
                    loop.call_soon_threadsafe(running.cancel)


def _number(reward: Any) -> float:
    if isinstance(reward, (str, bytes)):  # float("1.0") would pass
        raise TypeError
    return float(reward)


def _log_nothing(*_: Any, **__: Any) -> None:
    """In place of TRL's loggers: the probe's rewards do not belong in the metrics of training."""

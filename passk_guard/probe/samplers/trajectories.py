"""Completions of several turns, through a TRL trainer's own loop: its tools, its environments, its rollout function."""

from __future__ import annotations

import asyncio
import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from typing import Any

from passk_guard.probe.samplers.protocol import Samples
from passk_guard.probe.timeouts import Overdue, TimeLimit
from passk_guard.utils.errors import FailedRefresh, GuardError
from passk_guard.utils.private_api import requires
from passk_guard.utils.text import describe_error

Row = Mapping[str, Any]
_ABSENT = object()
_NO_TOOLS = ("reset", "get_reward")


class Trajectories:
    """Samples as `GRPOTrainer` does where a completion is more than one turn of the policy.

    Tools are the trainer's. Environments are made by its factories for each refresh, one a completion, and never those
    of training; `close` ends them once their rewards are read, by `_close()` or `close()` where they have it (TRL takes
    every public method for a tool). A tool that raises gives its error to the policy, as in training, and so does one
    that takes longer than `timeout`.

    Args:
        trainer: a GRPOTrainer with tools, environments or a rollout function.
        timeout: seconds for one call of a tool or a reset; None for no limit.
    """

    needs = requires(
        "trl",
        "GRPOTrainer",
        "held-out probes with tools, environments or a rollout function",
        "pass your own `sampler`",
        _metrics="kept apart from those of training",
        _standalone_tools="tools that belong to no environment",
        _multi_environment="whether a row names its environment",
    )

    def __init__(self, trainer: Any, timeout: float | None = None) -> None:
        self._trainer, self._limit = trainer, TimeLimit(timeout)
        self._made: list[Any] = []

    @staticmethod
    def of(trainer: Any, timeout: float | None = None) -> Trajectories | None:
        """What this trainer needs; None where a completion is one turn.

        Raises:
            GuardError: an installed TRL that keeps its tools in another way.
        """
        if not takes_turns(trainer):
            return None
        Trajectories.needs.check(trainer)
        return Trajectories(trainer, timeout)

    def sample(self, rows: Sequence[Row]) -> Samples:
        """One trajectory a row.

        A row whose environment cannot be made or reset gets a trajectory without one, as one of `lost`: what is
        sampled side by side stays of one shape, on every rank.

        Raises:
            FailedRefresh: a reset that hangs, a rollout function without `env_mask`, or images in what came back.
        """
        prompts, columns = [copy.deepcopy(row["prompt"]) for row in rows], dict[str, Any]()
        batch, lost = self._batch(rows)
        if "environments" in batch:
            columns["environments"] = batch["environments"]
            for i in sorted(set(range(len(rows))) - set(lost)):
                try:
                    prompts[i] = self._observed(prompts[i], batch["environments"][i], rows[i])
                except Overdue as error:  # the next one may hang as long
                    raise FailedRefresh(f"the reset of an environment {error}") from None
                except Exception as error:
                    lost[i] = f"an environment could not be reset: {describe_error(error)}"
        found = self._generate(prompts, batch | {"_metrics": _metrics()})
        prompt_ids, completion_ids, masks, completions = found[:4]
        if any(part is not None and any(part) for part in found[6:]):
            raise FailedRefresh("a tool or an environment returned images; only text can be scored")
        if getattr(self._trainer, "rollout_func", None) is not None:
            if masks is None:
                raise FailedRefresh(
                    "`rollout_func` returned no `env_mask`: return beside `prompt_ids` and `completion_ids` 1 for each "
                    "completion token that the policy sampled and 0 for each other, all 1 where it sampled all"
                )
            columns |= {n: v for n, v in found[5].items() if isinstance(v, list) and len(v) == len(rows)}
        return Samples(
            [list(ids) for ids in prompt_ids],
            [list(ids) for ids in completion_ids],
            list(completions),
            None if masks is None else [list(map(int, mask)) for mask in masks],
            columns,
            lost=lost,
        )

    def _generate(self, prompts: Sequence[Any], batch: Mapping[str, Any]) -> tuple[Any, ...]:
        """As the trainer, which gathers numbers for its metrics: a rank that fails would leave the others waiting."""
        trainer, real = self._trainer, self._trainer.accelerator.gather
        rollout: Callable[..., Any] | None = getattr(trainer, "rollout_func", None)

        def with_gather(prompts: Any, trainer: Any) -> Any:
            assert rollout is not None
            with borrowed(trainer.accelerator, {"gather": real}):
                return rollout(prompts, trainer)

        own = {} if rollout is None else {"rollout_func": with_gather}
        with borrowed(trainer, {**batch, **own}), borrowed(trainer.accelerator, {"gather": lambda tensor: tensor}):
            found: tuple[Any, ...] = trainer._generate(prompts)
        return found

    def tokenize(self, rows: Sequence[Row]) -> list[Sequence[int]]:
        """Tokens of the prompts alone, without what an environment adds to them."""
        with borrowed(self._trainer, {"_batch_environments": self._names(rows)}):
            ids, _, _ = self._trainer._tokenize_prompts([copy.deepcopy(row["prompt"]) for row in rows])
        return list(ids)

    def close(self) -> None:
        """Close the environments that were made since the last call, those that can be."""
        made, self._made = self._made, []
        for environment in made:
            with suppress(Exception):
                getattr(environment, "_close", getattr(environment, "close", lambda: None))()

    def _names(self, rows: Sequence[Row]) -> list[Any]:
        factories = getattr(self._trainer, "environment_factories", None)
        if factories is None or not self._trainer._multi_environment:
            return [None] * len(rows)
        names = [row.get("environment") for row in rows]
        if unknown := [name for name in names if name not in factories]:
            raise GuardError(
                f"Expected `environment` in each probe row to name one of {list(factories)}; found {unknown[0]!r}."
            )
        return names

    def _batch(self, rows: Sequence[Row]) -> tuple[dict[str, Any], dict[int, str]]:
        """What the trainer sets for a batch before it generates, with environments of the probe's own.

        Beside it why a row has none, for those that could not be made.
        """
        trainer, batch, environments = self._trainer, dict[str, Any](), [None] * len(rows)
        lost = dict[int, str]()
        if getattr(trainer, "environment_factories", None) is not None:
            names = self._names(rows)
            for i, name in enumerate(names):
                try:
                    environments[i] = trainer.environment_factories[name]()
                    self._made.append(environments[i])
                except Exception as error:
                    lost[i] = f"an environment could not be made: {describe_error(error)}"
            batch |= {"_batch_environments": names, "environments": environments}
        if trainer.tools:
            tools = [[*trainer._standalone_tools, *_methods(environment)] for environment in environments]
            batch["_sync_tool_dicts"] = [
                {tool.__name__: self._limited(tool) for tool in of if not inspect.iscoroutinefunction(tool)}
                for of in tools
            ]
            batch["_async_tool_dicts"] = [
                {tool.__name__: self._limited_async(tool) for tool in of if inspect.iscoroutinefunction(tool)}
                for of in tools
            ]
        return batch, lost

    def _observed(self, prompt: Any, environment: Any, row: Row) -> Any:
        """The prompt with what the environment says when it is reset for this row, as the trainer joins them."""
        columns = copy.deepcopy(dict(row))
        if self._trainer._multi_environment:
            columns.pop("environment")
        observation = self._limit.call(lambda: environment.reset(**columns))
        if observation is None:
            return prompt
        content = prompt[-1]["content"]
        if isinstance(observation, list) and isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if isinstance(observation, str) and isinstance(content, list):
            observation = [{"type": "text", "text": observation}]
        return [*prompt[:-1], {**prompt[-1], "content": content + observation}]

    def _limited(self, tool: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            return self._limit.call(lambda: tool(*args, **options))

        return call

    def _limited_async(self, tool: Callable[..., Any]) -> Callable[..., Any]:
        async def call(*args: Any, **options: Any) -> Any:
            return await asyncio.wait_for(tool(*args, **options), self._limit.seconds)

        return call


def joined(parts: Sequence[Samples]) -> Samples:
    """The samples of several calls in one."""
    masks = (
        None if any(part.policy_masks is None for part in parts) else [m for p in parts for m in p.policy_masks or ()]
    )
    starts = [0, *accumulate(map(len, parts))]
    return Samples(
        [ids for part in parts for ids in part.prompt_ids],
        [ids for part in parts for ids in part.completion_ids],
        [completion for part in parts for completion in part.completions],
        masks,
        {name: [value for part in parts for value in part.columns[name]] for name in parts[0].columns},
        lost={start + i: why for start, part in zip(starts, parts, strict=False) for i, why in part.lost.items()},
    )


def takes_turns(trainer: Any) -> bool:
    """Whether a completion of this trainer may be more than one turn of the policy."""
    return any(getattr(trainer, name, None) for name in ("tools", "environment_factories", "rollout_func"))


def what_acts(trainer: Any) -> str | None:
    """A clause on what the probe calls besides the model, for the line at the start; None where there is nothing."""
    names = [tool.__name__ for tool in getattr(trainer, "_standalone_tools", None) or ()]
    parts = [f"tools ({', '.join(names)})"] if names else []
    parts += ["environments, of its own"] * bool(getattr(trainer, "environment_factories", None))
    parts += ["rollout function"] * bool(getattr(trainer, "rollout_func", None))
    return (
        f"the probe uses the run's {' and '.join(parts)}: what they do outside, they do for it too" if parts else None
    )


@contextmanager
def borrowed(obj: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """Set attributes for the duration of the body, those that it does not have among them."""
    before = {name: vars(obj).get(name, _ABSENT) for name in values}
    try:
        for name, value in values.items():
            setattr(obj, name, value)
        yield
    finally:
        for name, value in before.items():
            if value is _ABSENT:
                delattr(obj, name)
            else:
                setattr(obj, name, value)


def _methods(environment: Any) -> list[Any]:
    """Those of its methods that are tools."""
    members = inspect.getmembers(type(environment), predicate=inspect.isfunction)
    names = [name for name, _ in members if name not in _NO_TOOLS and not name.startswith("_")]
    return [getattr(environment, name) for name in names]


def _metrics() -> dict[str, Any]:
    return {"train": defaultdict(list), "eval": defaultdict(list)}

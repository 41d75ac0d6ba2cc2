"""Published objectives as a `Weighting`, and by the name they have in a configuration: 'grpo', 'passk:8,floor=0.5'.

`grpo`, `dr_grpo` and `rloo` compare a reward with the mean of its group. `passk` and `passk_training` reward k samples
together if any of them is right, as does `verl_grpo_passk`, with k = n; `mixture` is part pass@1, part pass@k.
`maxrl` and `rs_grpo` maximise E[F(p)] with a concave F of the pass rate, so that the prompt weight is F'(p);
`surrogate` takes F' from you, and `tabulated` the advantages themselves.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor

from passk_guard.passk.closed_forms import pass_at_k, passk_weight, sample_coefficients, unbiased_passk_weight
from passk_guard.passk.weighting import Weighting, centred
from passk_guard.utils.errors import GuardError

TRL_EPSILON = 1e-4
_LARGEST_BETA = 700.0  # exp of more overflows float64


def grpo(epsilon: float = TRL_EPSILON) -> Weighting:
    r"""GRPO: the reward's distance from the group mean in standard deviations.

    $A = (r - \bar r) / (\sigma + \epsilon)$ with $\sigma^2 = \frac{n}{n-1} \bar r (1 - \bar r)$, as TRL's GRPOTrainer
    computes it with `scale_rewards="group"` (its default): the unbiased standard deviation, epsilon = 1e-4.
    Population weight $1 / (\sqrt{p(1-p)} + \epsilon)$, at least about 2 and largest for prompts that nearly always fail
    or pass. With n samples the weight is at most about sqrt(n) at either end.
    Sources: arXiv 2402.03300, Sec. 4.1 (the advantage; how the standard deviation is estimated is not stated);
    trl/trainer/grpo_trainer.py.

    Args:
        epsilon: > 0. verl adds 1e-6.

    Raises:
        GuardError: epsilon not finite or not positive.
    """
    _check_finite("epsilon", epsilon)
    if epsilon <= 0:
        raise GuardError(f"Expected `epsilon` > 0; found {epsilon}.")

    def scale(n: Tensor, c: Tensor) -> Tensor:
        return 1 / ((c * (n - c) / (n * (n - 1))).sqrt() + epsilon)

    name = "grpo" if epsilon == TRL_EPSILON else f"grpo:epsilon={_shortest(epsilon)}"
    return centred(name, scale, lambda p: 1 / ((p * (1 - p)).sqrt() + epsilon))


def dr_grpo() -> Weighting:
    r"""Dr. GRPO: the reward less the group mean, no scaling.

    $A = r - \bar r$. Population weight 1: pass@1 itself. The mean holds the sample's own reward, so that n samples
    give the weight (n-1)/n, the same for every prompt. TRL's GRPOTrainer with `scale_rewards="none"`.
    Source: arXiv 2503.20783, Sec. 3; its removal of length normalisation is not an advantage and not here.
    """
    return surrogate(torch.ones_like, "dr_grpo")


def rloo() -> Weighting:
    r"""RLOO: the reward less the mean reward of the *other* samples.

    $A_i = r_i - \frac{1}{n-1} \sum_{j \ne i} r_j = \frac{n}{n-1}(r_i - \bar r)$. Weight exactly 1 for every p and n:
    unbiased for pass@1. TRL's RLOOTrainer with `normalize_advantages=False` (its default) and `beta=0`: its KL
    penalty is part of the reward, which is then not 0/1.
    Source: arXiv 2402.14740.
    """
    return centred("rloo", lambda n, c: n / (n - 1) * torch.ones_like(c), torch.ones_like)


def passk(k: int, floor: float | None = None, cap: float | None = None) -> Weighting:
    r"""pass@k with leave-one-out weight and baseline: the advantages of `passk_advantages`.

    Population weight $f(w_k(p))$, $w_k(p) = k(1-p)^{k-1}$, f the clip to [floor, cap]. Without bounds n samples give
    exactly w_k(p), without bias; with them the mean of f over what n - 1 samples see of w_k.
    Source: arXiv 2602.21189, Sec. 3 (the weight); `sample_coefficients` (the estimator).

    Args:
        k: at least 1.
        floor, cap: bounds on the weight, at least 0; None for none.

    Raises:
        GuardError: k not a whole number of at least 1, a bound that is negative or not finite, or floor > cap.
    """
    _check_k(k)
    for bound, value in (("floor", floor), ("cap", cap)):
        if value is not None:
            _check_finite(bound, value, least=0)
    if floor is not None and cap is not None and floor > cap:
        raise GuardError(f"Expected `floor` <= `cap`; found floor={floor}, cap={cap}.")

    def advantages(n: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        positive, negative = sample_coefficients(n, c, k, floor=floor, cap=cap)
        return n * positive, n * negative

    def population_weight(p: Tensor) -> Tensor:
        w = passk_weight(p, k)
        return w if floor is None and cap is None else w.clamp(min=floor, max=cap)

    bounds = {"floor": floor, "cap": cap}
    more = "".join(f",{bound}={_shortest(value)}" for bound, value in bounds.items() if value is not None)
    return Weighting(f"passk:{k}{more}", population_weight, advantages, k)


def mixture(k: int, share: float) -> Weighting:
    r"""share grad J_1 + (1 - share) grad J_k: the advantages of `passk` at 1 and at k, mixed.

    Population weight $s + (1-s) w_k(p)$, exact at every n >= k. A recipe a J_1 + b J_k is share = a / (a + b), with
    the learning rate times a + b where the optimizer minds lengths: "1.0 pass@1 + 0.2 best@8" is
    mixture:k=8,share=0.8333333333333334 at 1.2 times the rate.

    Args:
        k: at least 1.
        share: of pass@1, in [0, 1].

    Raises:
        GuardError: k not a whole number of at least 1, or share outside [0, 1].
    """
    one, many = passk(1), passk(k)
    _check_finite("share", share, least=0)
    if share > 1:
        raise GuardError(f"Expected `share` in [0, 1], the part of pass@1; found {share}.")

    def mixed(a: Tensor, b: Tensor) -> Tensor:
        return share * a + (1 - share) * b

    def advantages(n: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        (of_right, of_wrong), (right, wrong) = one.advantages(n, c), many.advantages(n, c)
        return mixed(of_right, right), mixed(of_wrong, wrong)

    def population_weight(p: Tensor) -> Tensor:
        return mixed(one.population_weight(p), many.population_weight(p))

    return Weighting(f"mixture:k={k},share={_shortest(share)}", population_weight, advantages, k)


def verl_grpo_passk() -> Weighting:
    r"""verl's `grpo_passk`: the best sample of a group gets $r_{max} - r_{second}$, the others 0.

    With 0/1 rewards it is 1 for the right sample of a group with exactly one, and 0 everywhere else. Weight exactly
    $(1-p)^{n-1}$: that of pass@n over n, whatever k was meant. (As a *sum* over the samples, where the gradient here
    is their mean, it is $n (1-p)^{n-1}$.) The same pair is what "train on a prompt only if no *other* sample solved
    it" gives. verl divides by the group's standard deviation unless `norm_adv_by_std_in_grpo=False`: a factor of
    $\sqrt n$ here, the same for every prompt, and left out. The limit as n grows is 0 for every p > 0.
    Source: arXiv 2503.19595; `compute_grpo_passk_outcome_advantage` in verl/trainer/ppo/core_algos.py.
    """

    def advantages(n: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return (c == 1).double(), torch.zeros_like(n + c)

    return Weighting("verl_grpo_passk", lambda p: (p == 0).double(), advantages, 2)


def passk_training(k: int) -> Weighting:
    r"""Pass@k Training: a sample's mean reward over the k-subsets that hold it, group-normalised.

    With $\bar R = 1 - \binom{n-c}{k} / \binom{n}{k}$ and $\sigma = \sqrt{\bar R (1 - \bar R)}$, mean and standard
    deviation of the reward over all k-subsets, $A^+ = (1 - \bar R) / \sigma$ and
    $A^- = (1 - \bar R - \binom{n-c-1}{k-1} / \binom{n-1}{k-1}) / \sigma$. Both equal
    $s (r - \bar r)$ with $s = \frac{n}{n-c} \sqrt{(1 - \bar R) / \bar R}$, which is how they are computed. Zero where
    sigma = 0, i.e. for c = 0 and for n - c < k; so with n = k nothing is ever learnt.

    Population weight $w_k(p) / (k \sigma) = (1-p)^{k/2-1} / \sqrt{1 - (1-p)^k}$. The normalisation undoes much of the
    emphasis of pass@k: k = 1 is GRPO's weight, k = 2 still gives weight 1 at p = 1, and near p = 0 the weight
    grows as $1/\sqrt{kp}$, which is *smaller* for larger k. With n samples it is at most $\sqrt{(n-k)/k}$ there.
    Source: arXiv 2508.10751, Sec. 2.4 and its appendix, from which the weight is derived. The authors' code adds
    1e-6 to sigma, which is left out here.

    Args:
        k: at least 1.

    Raises:
        GuardError: k not a whole number of at least 1.
    """
    _check_k(k)

    def scale(n: Tensor, c: Tensor) -> Tensor:
        missed = unbiased_passk_weight(n, c, k + 1) / (k + 1)  # 1 - pass_at_k, with its digits where it is small
        return n / (n - c) * (missed / pass_at_k(n, c, k)).sqrt()

    def population_weight(p: Tensor) -> Tensor:
        return (1 - p) ** (k / 2 - 1) / (1 - (1 - p) ** k).sqrt()

    return centred(f"passk_training:{k}", scale, population_weight, fewest_samples=k)


def maxrl() -> Weighting:
    r"""Maximum Likelihood RL: u = log p, estimated by dividing by the number of successes in place of the samples.

    $A = (r - \bar r) / \bar r$, and 0 for a group without a success. Population weight 1/p. n samples give the
    series for log p cut off at order n - 1, *not* n: $W_n(p) = (1 - (1-p)^{n-1}) / p = \sum_{k<n} (1-p)^{k-1}$, at
    most n - 1. (The estimator without the baseline, $r / \bar r$, reaches order n. Groups without a success have no
    baseline either, which costs one order.)
    Source: arXiv 2602.02710, method section, and an appendix of its third version for the order n - 1. The authors'
    code adds 1e-6 to the divisor, which is left out here.
    """
    return surrogate(torch.reciprocal, "maxrl")


def rs_grpo(beta: float) -> Weighting:
    r"""RS-GRPO: risk-seeking for beta > 0, $u = \frac{1}{\beta} \log E[e^{\beta r}] = \frac{1}{\beta} \log(1 + pB)$.

    $A = \frac{1}{\beta} (e^{\beta r} / \overline{e^{\beta r}} - 1)$ with the mean over the group. With
    $B = e^\beta - 1$ this is $\frac{B}{\beta} (r - \bar r) / (1 + \bar r B)$, without any standard deviation despite
    the name. Population weight $\frac{B}{\beta (1 + pB)}$, from B/beta at p = 0 to $(1 - e^{-\beta})/\beta$ at
    p = 1. beta -> 0 is Dr. GRPO; as beta grows, beta times the weight tends to MaxRL's 1/p.
    Source: arXiv 2509.24261 (objective and advantage as in the authors' repository Jackory/RS-GRPO, which
    recommends beta = 2).

    Args:
        beta: not 0, within +-700; negative is risk-averse.

    Raises:
        GuardError: beta = 0, not finite, or outside.
    """
    _check_finite("beta", beta)
    if beta == 0:
        raise GuardError("Expected `beta` other than 0; found 0. That limit is `dr_grpo`.")
    if abs(beta) > _LARGEST_BETA:
        raise GuardError(f"Expected `beta` within +-{_LARGEST_BETA:g}; found {beta}. The large limit is `maxrl`.")
    lift = math.expm1(beta)

    def weight(p: Tensor) -> Tensor:
        return lift / beta / (1 + p * lift)

    return surrogate(weight, f"rs_grpo:beta={_shortest(beta)}")


def surrogate(weight: Callable[[Tensor], Tensor], name: str = "surrogate") -> Weighting:
    r"""Maximise E[F(p)] with a prompt weight F'(p) of your own, estimated where the group's mean is put for p.

    $A = F'(\bar r) (r - \bar r)$, and 0 for groups without a right or without a wrong sample. F = log p is MaxRL,
    F = p Dr. GRPO, F = 2 arcsin(sqrt p) GRPO but for its n - 1. Not by `named_weighting`: a function has no spec.
    Source: arXiv 2510.23049 (any advantage shaping is such an F, and back).

    Args:
        weight: p -> F'(p), elementwise on a float64 tensor of rates, finite inside (0, 1).
        name: for messages.
    """
    return centred(name, lambda n, c: weight(c / n), weight)


def tabulated(advantages: Tensor | Callable[[Tensor], Tensor], num_samples: int, name: str = "tabulated") -> Weighting:
    """An objective as data: what each possible group of *your* trainer gets.

    Args:
        advantages: [n+1, 2] A+ and A- of a group of n samples with c = 0..n of them right, one row for each c; A+ of
            row 0 and A- of row n are not used. Or your trainer's own function, from the 0/1 rewards [n] of one group
            to its advantages [n]; it is called for each c.
        num_samples: n, the only size of a group for which the weighting is defined. Its `population_weight` is the
            expected weight at this n.
        name: for messages.

    Raises:
        GuardError: a table of another shape or with values that are not finite, a function that gives samples of
            equal reward different advantages, or (later) a group of another size.
    """
    n = num_samples
    if callable(advantages):
        advantages = torch.stack([_row(advantages, n, c) for c in range(n + 1)])
    table = torch.as_tensor(advantages, dtype=torch.float64)
    if tuple(table.shape) != (n + 1, 2) or not bool(table.isfinite().all()):
        found = f"shape {tuple(table.shape)}" if tuple(table.shape) != (n + 1, 2) else "values that are not finite"
        raise GuardError(f"Expected `advantages` [{n + 1}, 2] of finite numbers for num_samples={n}; found {found}.")

    def look_up(size: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        if bool((size != n).any()):
            raise GuardError(f"Expected groups of {n} samples for {name!r}, as in its table; found another size.")
        return table[c.long(), 0], table[c.long(), 1]

    weighting = Weighting(name, lambda p: weighting.effective_weight(p, n), look_up, n)
    return weighting


def _row(compute: Callable[[Tensor], Tensor], n: int, c: int) -> Tensor:
    """[2] A+ and A- of a group with c right samples; 0 for those it has none of."""
    found = torch.as_tensor(compute((torch.arange(n) < c).double())).double()
    if tuple(found.shape) != (n,):
        raise GuardError(f"Expected `advantages` to return [{n}] for a group of {n}; found {tuple(found.shape)}.")
    parts = [part if part.numel() else torch.zeros(1, dtype=torch.float64) for part in (found[:c], found[c:])]
    if not all(torch.allclose(part, part[0].expand_as(part)) for part in parts):
        raise GuardError(
            f"Expected `advantages` to depend on the reward alone; found {found.tolist()} for {c} right samples of {n}."
        )
    return torch.stack([part[0] for part in parts])


_CONSTRUCTORS: dict[str, tuple[Callable[..., Weighting], dict[str, type]]] = {
    "grpo": (grpo, {"epsilon": float}),
    "dr_grpo": (dr_grpo, {}),
    "rloo": (rloo, {}),
    "maxrl": (maxrl, {}),
    "passk": (passk, {"k": int, "floor": float, "cap": float}),
    "mixture": (mixture, {"k": int, "share": float}),
    "verl_grpo_passk": (verl_grpo_passk, {}),
    "passk_training": (passk_training, {"k": int}),
    "rs_grpo": (rs_grpo, {"beta": float}),
}
_SPELLINGS = (
    "grpo[:epsilon=E], dr_grpo, rloo, maxrl, passk:K[,floor=F][,cap=C], mixture:k=K,share=S, verl_grpo_passk, "
    "passk_training:K, rs_grpo:beta=B"
)


def named_weighting(spec: str) -> Weighting:
    """The weighting a text names.

    Args:
        spec: a name, then after a colon its parameters as `key=value` with commas between. The first key may be left
            out. One of: `grpo[:epsilon=E]`, `dr_grpo`, `rloo`, `maxrl`, `passk:K[,floor=F][,cap=C]`,
            `mixture:k=K,share=S` (share of pass@1), `verl_grpo_passk`, `passk_training:K`, `rs_grpo:beta=B`.

    Raises:
        GuardError: an unknown name or parameter, one that is missing, given twice or not a number, or a value that
            the constructor refuses.
    """
    name, colon, rest = spec.partition(":") if isinstance(spec, str) else ("", "", "")
    constructor, types = _CONSTRUCTORS.get(name.strip(), (None, {}))
    if constructor is None:
        raise GuardError(f"Expected `spec` to be one of {_SPELLINGS}; found {spec!r}.")
    given: dict[str, float] = {}
    for position, part in enumerate(rest.split(",") if colon else []):
        key, equals, value = (text.strip() for text in part.partition("="))
        if not equals and position == 0 and types:
            key, value = next(iter(types)), key
        if key not in types or key in given:
            raise _misread(spec, f"parameter {key!r} is {'given twice' if key in given else 'unknown'}")
        try:
            given[key] = types[key](value)
        except ValueError:
            kind = "whole number" if types[key] is int else "number"
            raise _misread(spec, f"{value!r} is not a {kind}") from None
    try:
        inspect.signature(constructor).bind(**given)
    except TypeError as error:
        raise _misread(spec, str(error)) from None
    return constructor(**given)


def _check_k(k: int) -> None:
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise GuardError(f"Expected `k` to be a whole number >= 1; found {k!r}.")


def _check_finite(name: str, value: float, *, least: float = -math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < least:
        bound = "" if least == -math.inf else f" >= {least:g}"
        raise GuardError(f"Expected `{name}` to be a finite number{bound}; found {value!r}.")


def _shortest(value: float) -> str:
    """Shortest text that reads back as the same float: 2.0 -> '2'."""
    return repr(float(value)).removesuffix(".0")


def _misread(spec: str, reason: str) -> GuardError:
    return GuardError(f"Expected `spec` to be one of {_SPELLINGS}; found {spec!r}: {reason}.")

"""The paper's contextual-bandit toy: every printed number beside ours, computed in float64 by autograd.

    python -m examples.paper_toy

Two prompts, two actions, two parameters: pi(1|x) = sigmoid(theta . psi(x)). The easy prompt wants action 0, the hard
one action 1, and their features nearly coincide, so that what helps one harms the other. At k = 10 the step along
grad J_10 raises pass@10 and lowers pass@1.

Left out: the paper's Gaussian feature clouds; its printed numbers are those of the two prompts alone. Its theta is
not printed either: (-2, -2) is inferred, and reproduces all of them. Source: arXiv 2602.21189v1, Sec. 3 and 4.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from passk_guard.passk.closed_forms import passk_weight

REFERENCE = Path(__file__).parents[1] / "tests" / "reference" / "paper_toy.json"
TOLERANCE = 1e-9  # relative, against the reference's float64 digits
PRINTED_AS = {"cos_J1_J10": "cosine"}  # the paper's name -> ours


def float64(value: float | list[float]) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def success(theta: Tensor, prompts: list[dict]) -> Tensor:
    """p(x) of each prompt, [2]."""
    psi = float64([x["psi"] for x in prompts])  # [2, 2]
    up = torch.sigmoid(psi @ theta)  # [2] pi(1|x)
    wants_one = torch.tensor([bool(x["correct_action"]) for x in prompts])
    return torch.where(wants_one, up, 1 - up)


def objective(theta: Tensor, prompts: list[dict], q: Tensor, k: int) -> Tensor:
    """J_k = sum_x q(x) (1 - (1 - p(x))^k)."""
    return q @ (1 - (1 - success(theta, prompts)) ** k)


def crossing(inner_product, low: float = 1.0, high: float = 64.0) -> float:
    """The real k* at which <grad J_k, grad J_1> passes from + to -, by bisection."""
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if inner_product(middle) > 0 else (low, middle)
    return low


def reproduce(reference: dict) -> dict[str, float | list[float]]:
    """The reference's numbers, recomputed from theta, the prompts, k and the step size alone."""
    theta = float64(reference["theta"]).requires_grad_()
    kinds = ["easy", "hard"]
    prompts = [reference["prompts"][kind] for kind in kinds]
    q = float64([reference["prompt_distribution"][kind] for kind in kinds])
    k, eta = reference["k"], reference["step_size"]

    p = success(theta, prompts)
    grad_p = torch.stack([torch.autograd.grad(value, theta, retain_graph=True)[0] for value in p])  # [2, 2]
    p = p.detach()
    kappa = grad_p @ grad_p.T  # [2, 2] similarity kernel
    agreement = kappa @ q  # [2] a(x) = E_x' kappa(x, x')
    w = passk_weight(p, k)  # [2]

    def gradient(j: float) -> Tensor:
        return (q * passk_weight(p, j)) @ grad_p  # grad J_j = E[w_j grad p]

    g1, gk = gradient(1), gradient(k)
    inner = gk @ g1
    mixing = -inner / (g1 @ g1)
    projected = gk + mixing.clamp(min=0) * g1  # one-sided projection: <projected, g1> = 0

    with torch.no_grad():
        value = {j: objective(theta, prompts, q, j) for j in (1, k)}
        stepped = {j: objective(theta + eta * gk, prompts, q, j) for j in (1, k)}
        guarded = {j: objective(theta + eta * projected, prompts, q, j) for j in (1, k)}

    out = {
        "p_easy": p[0],
        "p_hard": p[1],
        "w_easy": w[0],
        "w_hard": w[1],
        "grad_p_easy": grad_p[0],
        "grad_p_hard": grad_p[1],
        "kappa_easy_hard": kappa[0, 1],
        "cos_grad_p": torch.cosine_similarity(grad_p[0], grad_p[1], dim=0),
        "grad_J1": g1,
        "grad_J10": gk,
        "inner_product": inner,
        "cosine": inner / (g1.norm() * gk.norm()),
        "agreement_easy": agreement[0],
        "agreement_hard": agreement[1],
        "J1_before": value[1],
        "J1_after": stepped[1],
        "J10_before": value[k],
        "J10_after": stepped[k],
        "mixing_lambda": mixing,
        "pcgrad_one_sided_direction": projected,
        "pcgrad_one_sided_delta_J1": guarded[1] - value[1],
        "pcgrad_one_sided_delta_J10": guarded[k] - value[k],
        "k_star_real": float64(crossing(lambda j: gradient(j) @ g1)),
    }
    by_k = {f"inner_product_k{j}": gradient(int(j)) @ g1 for j in reference["float64"]["inner_product_by_k"]}
    return {name: number.tolist() for name, number in (out | by_k).items()}


def as_printed(value: float, printed: float) -> str:
    """`value` rounded to the precision of the paper's number: two decimals, or three digits when tiny."""
    return f"{value:.2e}" if abs(printed) < 1e-3 else f"{value:.2f}"


def mismatches(ours: dict, reference: dict) -> list[str]:
    """Names of the numbers that differ: from the paper at its precision, from the reference at `TOLERANCE`."""
    digits = dict(reference["float64"])
    digits |= {f"inner_product_k{j}": value for j, value in digits.pop("inner_product_by_k").items()}
    wrong = [
        f"{name}: ours {ours[name]}, reference {expected}"
        for name, expected in digits.items()
        if not torch.allclose(float64(ours[name]), float64(expected), rtol=TOLERANCE, atol=0)
    ]
    for name, printed in reference["printed_in_paper"].items():
        mine = as_printed(ours[PRINTED_AS.get(name, name)], printed)
        if mine != as_printed(printed, printed):
            wrong.append(f"{name}: ours {mine}, paper {printed}")
    return wrong


def main() -> int:
    reference = json.loads(REFERENCE.read_text())
    ours = reproduce(reference)
    print(f"{'':28}{'paper':>12}{'ours':>12}   float64")
    for name, printed in reference["printed_in_paper"].items():
        value = ours[PRINTED_AS.get(name, name)]
        print(f"{name:28}{as_printed(printed, printed):>12}{as_printed(value, printed):>12}   {value:.12g}")
    print("\nNot printed in the paper")
    for name in ("inner_product", "k_star_real", "mixing_lambda"):
        print(f"{name:28}{ours[name]:24.12g}")
    change = {j: ours[f"J{j}_after"] - ours[f"J{j}_before"] for j in (1, 10)}
    kept = {j: ours[f"pcgrad_one_sided_delta_J{j}"] for j in (1, 10)}
    print(f"\nOne step of {reference['step_size']}      change in pass@1   in pass@10")
    print(f"along grad J_10    {change[1]:+16.4f}{change[10]:+13.4f}")
    print(f"the same, projected{kept[1]:+16.4f}{kept[10]:+13.4f}")
    wrong = mismatches(ours, reference)
    for line in wrong:
        print(f"MISMATCH {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

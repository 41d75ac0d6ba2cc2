"""The numbers of an analysis as text: with their uncertainty, as verdicts, as undetermined, as tables in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING, Any

from passk_guard.planning import prompts_needed, read_noise, refreshes_for_signal
from passk_guard.reporting.html.text import told_apart, write_number
from passk_guard.utils.text import plain_text

if TYPE_CHECKING:
    from passk_guard.analysis.results import Analysis

UNDETERMINED = "undetermined"
_TIED = "\u00a0"  # keeps an interval on one line of a narrow column
_PROMPTS = 10
Data = Mapping[str, Any]


def value(number: Data, digits: int = 3) -> str:
    """The estimate alone; "undetermined" where there is none."""
    return UNDETERMINED if number["value"] is None else _fixed(number["value"], digits)


def interval(number: Data, digits: int = 3) -> str:
    """[low, high], or the standard error where there is no interval."""
    if number["value"] is None:
        return UNDETERMINED
    if number["low"] is not None and number["high"] is not None:
        return f"[{_fixed(number['low'], digits)},{_TIED}{_fixed(number['high'], digits)}]"
    if number["standard_error"] is not None:
        return f"±{_TIED}{_fixed(number['standard_error'], digits)}"
    return "no spread seen"


def with_interval(number: Data, digits: int = 3) -> str:
    """The estimate and its interval."""
    return UNDETERMINED if number["value"] is None else f"{value(number, digits)}{_TIED}{interval(number, digits)}"


def scientific(number: Data) -> str:
    """The estimate and its standard error with two significant digits, for inner products of gradients."""
    if number["value"] is None:
        return UNDETERMINED
    error = number["standard_error"]
    spread = "" if error is None else f"{_TIED}±{_TIED}{_short(error)}"
    return f"{_short(number['value'])}{spread}"


def level(data: Data) -> str:
    """The confidence as text, e.g. "95%"."""
    return f"{100 * data['settings']['confidence']:g}%"


def verdict(data: Data) -> tuple[str, str]:
    """One sentence on the whole, and its kind: "bad", "good" or ""."""
    at = data["at_k"][-1]
    k, status = at["k"], at["status"]
    if status is None:
        return "Only k = 1 was asked for, which has nothing to conflict with.", ""
    if at["cosine"]["value"] is None:
        smaller = k_star(data) if data["curve"] is not None and (data["curve"]["k_star_low"] or 1) > 1 else ""
        parts = (f"Undetermined at k = {k}: {at['reason']}.", smaller, what_it_takes(data))
        return " ".join(part for part in parts if part), ""
    sentence = f"cos(∇J_{k}, ∇J_1) = {value(at['cosine'], 2)}, {level(data)} interval {interval(at['cosine'], 2)}."
    if status == "conflict":
        return (
            f"Conflict: a pass@{k} step lowers pass@1 on prompts like these. {sentence} {k_star(data)}",
            "bad",
        )
    if status == "clear":
        return f"Clear: a pass@{k} step raises pass@1 too. {sentence}", "good"
    words = (f"Undetermined: the probe cannot tell whether pass@{k} and pass@1 conflict.", sentence, k_star(data))
    return " ".join([*words, what_it_takes(data)]).rstrip(), ""


def k_star(data: Data) -> str:
    """k* as a sentence, with its confidence set."""
    curve = data["curve"]
    if curve is None:
        return "k* is undetermined."
    last, low, high = curve["k"][-1], curve["k_star_low"], curve["k_star_high"]
    if low is None:  # an analysis of an earlier version: the intervals of each k
        threshold, lows = data["settings"].get("threshold", 0.0), curve["low"]
        low = next((k - 1 for k, x in zip(curve["k"][1:], lows[1:], strict=True) if x is None or x < threshold), last)
    within = "" if high is None else f"; {level(data)} set: {low} to {high}" + (" or more" if high == last else "")
    if any(curve["established"]):
        return f"k* = {curve['k_star']}: up to there no conflict is established{within}."
    if low == 1 < last:
        return f"The probe cannot tell at which k a conflict begins, nor whether one does up to k = {last}{within}."
    if low == last:
        return f"There is no conflict up to k = {last}, the smallest number of samples of a prompt{within}."
    return f"There is no conflict up to k = {low}. Above it, to k = {last}, the probe cannot tell{within}."


def what_it_takes(data: Data) -> str:
    """How many prompts would tell, as a sentence; nothing where the analysis holds no noise to plan with."""
    if data.get("noise") is None:
        return ""
    noise, settings = read_noise(data["noise"]), data["settings"]
    needed = prompts_needed(noise, settings["threshold"], settings["confidence"])
    if needed is None:
        times = refreshes_for_signal(noise)
        more = (
            "choose prompts the model solves sometimes" if times is None else f"{max(2, times)} times the prompts would"
        )
        return f"The probe does not establish how large the gradients are: {more}."
    cosine, prompts = needed
    return f"One estimate finds a cosine of {_fixed(cosine, 2)} with 90% power on {prompts} prompts."


def hurt(prompt: Data, texts: Mapping[int, str], length: int = 40, most: int = 3) -> str:
    """The prompts this one hurts most, with the inner products."""
    worst = prompt["hurts"][:most]
    return "; ".join(f"{excerpt(texts.get(place, f'#{place}'), length)} ({_short(v)})" for place, v in worst)


def most_negative(data: Data, count: int) -> list[Data]:
    """The prompts that pull most against the others, first; none where there is no conflict to share."""
    if data["at_k"][-1]["status"] == "clear":
        return []
    against = [p for p in data["prompts"] if (p["share"]["value"] or 0.0) > 0]
    return sorted(against, key=lambda p: -p["share"]["value"])[:count]


def predicted(data: Data) -> list[Data]:
    """The predictions that say something: none for a checkpoint without a conflict to mend."""
    return [] if data["at_k"][-1]["status"] == "clear" else data["predictions"]


def told(number: Data, digits: int = 2) -> str:
    """`with_interval` of a cosine; "undetermined" where its interval is all that a cosine can be."""
    low, high = number["low"], number["high"]
    anything = low is not None and high is not None and low <= -0.995 and high >= 0.995
    return UNDETERMINED if anything else with_interval(number, digits)


def short_texts(data: Data) -> dict[int, str]:
    """What tells the prompts apart, by their places."""
    found = told_apart([p["text"] for p in data["prompts"]])
    return {p["place"]: text for p, text in zip(data["prompts"], found, strict=True)}


def excerpt(text: str, length: int) -> str:
    """The text on one line, cut after `length` characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= length else flat[: length - 1].rstrip() + "…"


def settings_rows(data: Data) -> list[tuple[str, str]]:
    """Names and values of the settings and of the sketch."""
    sketch, chosen = data["sketch"], data["settings"]
    share = sketch["covered"] / sketch["total"]
    missing: Sequence[str] = sketch["uncovered"]
    left = f"; not: {', '.join(missing[:5])}{' and more' if len(missing) > 5 else ''}" if missing else ""
    return [
        ("sketch", f"{sketch['method']}, {sketch['dim']} dimensions, seed {sketch['seed']}"),
        ("gradients with respect to", sketch["parameters"]),
        ("coverage", f"{100 * share:.4g}% of {sketch['total']:,} parameters{left}"),
        *((name.replace("_", " "), _plain(setting)) for name, setting in chosen.items() if name != "prompts"),
        ("prompts", "all of the probe" if chosen["prompts"] is None else f"{chosen['prompts']} sampled from the probe"),
        ("model fingerprint", data["model"]["fingerprint"]),
    ]


def _plain(setting: Any) -> str:
    if isinstance(setting, (list, tuple)):
        return ", ".join(map(str, setting))
    return "none" if setting is None else str(setting)


def _fixed(number: float, digits: int) -> str:
    return write_number(number, 10.0**-digits)


def _short(number: float) -> str:
    text = f"{number:.0f}" if 100 <= abs(number) < 1e6 else f"{number:.2g}"
    return text.replace("-", "−")


@dataclass(frozen=True)
class TextTable:
    """Headings and rows of text, at most 80 columns wide, and notes beneath."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def print_analysis(analysis: Analysis, file: Any = None) -> None:
    """Print the verdict and the tables of one checkpoint, to a text stream or to standard output."""
    data = analysis.to_dict()
    for sentence in (verdict(data)[0], _about(data)):
        print(fill(plain_text(sentence), 80), file=file)
    for table in tables(data):
        print(f"\n{table.title}", file=file)
        for line in aligned([table.columns, *([plain_text(cell) for cell in row] for row in table.rows)]):
            print(" ", line, file=file)
        for note in table.notes:
            print(fill(plain_text(note), 80), file=file)


def aligned(rows: Sequence[Sequence[str]], justify: Callable[[str, int], str] = str.ljust) -> list[str]:
    """The rows as lines with columns of fixed width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(justify(cell, w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def tables(data: Data) -> Iterator[TextTable]:
    """The tables of an analysis that have rows."""
    for table in (_at_k(data), _prompts(data), _mitigations(data)):
        if table.rows:
            yield table


def _about(data: Data) -> str:
    remark = f" {data['remark']}." if data["remark"] else ""
    return (
        f"{data['model']['name']}: {data['num_prompts']} prompts x {data['settings']['num_samples']} samples; "
        f"{data['never_solved']} never solved, {data['always_solved']} always, {data['left_out']} left out.{remark}"
    )


def _at_k(data: Data) -> TextTable:
    rows = [
        (
            str(at["k"]),
            with_interval(at["pass_rate"]),
            "" if at["status"] is None else with_interval(at["cosine"], 2),
            at["status"] or "",
        )
        for at in data["at_k"]
    ]
    notes = [f"{level(data)} intervals. {k_star(data)}"]
    return TextTable("pass@k and its angle to pass@1", ("k", "pass@k", "cos(∇J_k, ∇J_1)", "status"), rows, notes)


def _prompts(data: Data) -> TextTable:
    worst = most_negative(data, _PROMPTS)
    shown = short_texts(data)
    rows = [
        (
            excerpt(plain_text(shown[p["place"]]), 28),
            with_interval(p["share"], 2),
            with_interval(p["pass_rate"], 2),
            scientific(p["agreement"]),
        )
        for p in worst
    ]
    of = "conflict" if data["at_k"][-1]["status"] == "conflict" else "pull"
    title = f"Prompts that pull against the others, with their share of the {of}"
    return TextTable(title, ("prompt", "share", "p-hat", "agreement"), rows)


def _mitigations(data: Data) -> TextTable:
    found = predicted(data)
    rows = [(p["name"], p["setting"], told(p["cosine"]), told(p["kept"])) for p in found]
    columns = ("mitigation", "setting", "cosine to expect", "pass@k gain kept")
    notes = [f"{p['name']}: {p['note']}" for p in found if p["note"]]
    return TextTable("What the mitigations would do", columns, rows, notes)

"""Points as tables, and bars: what was promised of them, held, not held, or not measured."""

from dataclasses import asdict

from benchmarks.common import Bar
from benchmarks.gpu.scan import CHUNKS, PUBLIC
from titans_pretrain.evaluation.figures import markdown_table

Points = list[dict]


def find(points: Points, **settings) -> dict | None:
    """The measured point with these settings."""
    for p in points:
        if all(p.get(k) == v for k, v in settings.items()) and not {"skipped", "failed"} & p.keys():
            return p
    return None


def bars_of(points: Points, quick: bool) -> tuple[list[Bar], list[str]]:
    """The bars that were measured, and the names of those that were not."""
    bars: list[Bar] = []
    missing: list[str] = []

    def bar(name: str, measured: float | None, limit: float, unit: str, at_least: bool = True) -> None:
        if measured is None:
            missing.append(name)
        else:
            bars.append(Bar(name, measured, limit, unit, at_least))

    def number(name: str, **settings) -> float | None:
        point = find(points, **settings)
        return None if point is None else point.get(name)

    for dtype in ("float32", "bfloat16"):
        bar(f"witness in whole numbers, {dtype}", number("exact", test="witness", dtype=dtype), 1, "exact")
        rows = tried(points, test="errors", dtype=dtype)
        held = sum(p.get("held", False) for p in rows) if rows else None
        bar(f"rows within the tolerances, {dtype}", held, len(rows), "rows")
    probes = tried(points, test="probe")
    loaded = [p for p in probes if p.get("loaded")]
    bar("assemblers whose code the driver loads", len(loaded) if probes else None, len(probes), "of them")
    bar("different bits among assemblers", len({p["digest"] for p in loaded}) or None, 1, "", False)
    for depth in (1, 2):
        bar(
            f"results of 20 runs, depth {depth}",
            number("different", test="repeats", depth=depth),
            1,
            "different",
            False,
        )
    bar("errors that compute-sanitizer finds", number("errors", test="sanitizer"), 0, "", False)

    batch, tokens = (2, 130) if quick else (8, 4096)
    speed = "both_tokens_per_second"
    for chunk in CHUNKS[:2]:
        row = dict(test="scan", depth=2, expansion=4, chunk=chunk)
        short = dict(row, batch=batch, tokens=tokens)
        mine = number(speed, side="ours", **short)
        bar(f"scan, chunk {chunk}: of the roofline's floor", number("both_of_floor", side="ours", **short), 0.30, "")
        eager = number(speed, side="chunked, eager", **short)
        bar(f"scan, chunk {chunk}: over chunked in eager torch", over(mine, eager), 10, "times")
        long = number(speed, side="ours", **row, batch=1, tokens=32768)
        bar(f"scan, chunk {chunk}: 1 x 32K over 8 x 4K, per token", over(long, mine), 0.7, "times")
    layer = over(number(speed, test="layer"), PUBLIC["tokens_per_second"])
    bar("layer over the public figure of an A100", None if quick else layer, 10, "times")

    def trained(variant: str, rows: int, tokens: int) -> float | None:
        return number("tokens_per_second", test="step", size="760m", variant=variant, rows=rows, tokens=tokens)

    for variant in ("mag", "lmm"):
        for rows, tokens, limit in ((8, 4096, 0.83), (2, 16384, 1.4)):
            times = over(trained(variant, rows, tokens), trained("transformer, full", rows, tokens))
            bar(f"760M {variant} step over the transformer's, {tokens // 1024}K", times, limit, "times")
    bar(
        "760M mag, 1M tokens over 32K, tokens/s",
        over(trained("mag", 1, 1 << 20), trained("mag", 1, 32768)),
        0.9,
        "times",
    )
    bar("first step, cold", number("cold_seconds", test="first step"), 60, "s", False)
    for side in ("ZeRO 1", "ring, cp 2"):
        bar(f"train: {side} against one process, relative", number("off", test="train", side=side), 1e-3, "", False)
    return bars, missing


def tried(points: Points, **settings) -> Points:
    """Those with these settings that were begun, failed ones too."""
    return [p for p in points if all(p.get(k) == v for k, v in settings.items()) and "skipped" not in p]


def over(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def figures(points: Points, setup: dict, quick: bool) -> dict:
    bars, missing = bars_of(points, quick)
    return {
        "setup": setup, "points": points, "bars": [asdict(b) | {"held": b.held} for b in bars], "not_measured": missing,
    }  # fmt: skip


def markdown(points: Points, setup: dict, quick: bool) -> str:
    bars, missing = bars_of(points, quick)
    text = [f"# GPU: {setup['card']}, {setup['date']}", "", f"    {setup['command']}", ""]
    text += [f"{name}: {value}  " for name, value in setup.items() if name not in ("command",)]
    if quick:
        text += ["", "Tiny sizes: whether every line works, and no figure of a speed."]
    text += ["", "## Bars", ""]
    rows = [
        [
            b.name,
            f"{b.measured:.3g} {b.unit}".strip(),
            f"{'>=' if b.at_least else '<='} {b.limit:g}",
            "held" if b.held else "NOT HELD",
        ]
        for b in bars
    ]
    text.append(
        markdown_table(["bar", "measured", "limit", ""], rows + [[name, "", "", "not measured"] for name in missing])
    )
    for part in dict.fromkeys(p["part"] for p in points):
        text += ["", f"## {part.capitalize()}", ""]
        own = [p for p in points if p["part"] == part]
        for test in dict.fromkeys(p.get("test", "") for p in own):
            text += [_table([p for p in own if p.get("test", "") == test]), ""]
    return "\n".join(text)


def _table(points: Points) -> str:
    """All numbers of points of one kind; a list where there is one point with much to tell."""
    hidden = ("part", "each", "machine", "output", "took", "numbers", "test")
    names = list(dict.fromkeys(name for p in points for name in p if name not in hidden))
    if len(points) == 1 and "machine" in points[0]:
        facts = points[0]["machine"] | {"faults": points[0]["faults"]}
        return "\n".join(f"- {name.replace('_', ' ')}: {_cell(value)}" for name, value in facts.items())
    rows = [[_cell(p.get(name)) for name in names] for p in points]
    return f"### {points[0].get('test', '').capitalize()}\n\n" + markdown_table(
        [n.replace("_", " ") for n in names], rows
    )


def _cell(value) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value).replace("|", "/")
    if isinstance(value, int):
        return f"{value:,}" if value >= 10000 else str(value)
    return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}"

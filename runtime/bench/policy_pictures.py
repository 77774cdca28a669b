"""Tables and a picture of what ``headwise bench policies`` found, made of the lines that it prints as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from rich.table import Table

from headwise.runtime.bench import figures, report
from headwise.runtime.sizes import size_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Result = dict[str, Any]


def tables(results: Sequence[Result]) -> list[Table]:
    """Args: ``results``: of at least one policy and one shape."""
    policies, dtypes, shapes = (_of(kind, results) for kind in ("policy", "kv_dtype", "shape"))
    made = [_by_position(policies), _by_policy(policies)]
    if dtypes:
        made.append(_by_dtype(dtypes))
    return [*made, _by_shape(shapes)]


def draw(model: str, text: str, results: Sequence[Result]) -> Figure:
    """Perplexity, memory and time against the position in the text, and bytes a token."""
    policies, shapes = _of("policy", results), _of("shape", results)
    subtitle = f"{model} reads {text}; keys and values in float32"
    figure, (quality, memory, time, token) = figures.new_figure("KV policies", subtitle, 4)
    _lines(quality, policies, _middles)
    quality.set(title="How well it reads", ylabel="perplexity of a stretch", yscale="log")
    _lines(memory, policies, lambda one: [(length, size / 2**20) for length, size in one["kv_bytes"]])
    memory.set(title="Memory", ylabel="MiB of keys and values in use", ylim=(0, None))
    _lines(time, policies, lambda one: one["token_ms"])
    time.set(title="Time of one more token", ylabel="milliseconds", yscale="log")
    for axes in (quality, time):
        axes.yaxis.set_major_formatter(lambda value, _: figures.short(value))
        axes.yaxis.set_minor_formatter(lambda value, _: figures.short(value))
    for axes in (quality, memory, time):
        axes.set(xlabel="position in the text", xlim=(0, None))
    quality.legend()
    _bars(token, shapes)
    return figure


def _of(kind: str, results: Sequence[Result]) -> list[Result]:
    return [result for result in results if kind in result]


def _by_position(policies: Sequence[Result]) -> Table:
    rows = [
        [f"{start:,} to {stop - 1:,}", *(_number(one["stretches"][index][2]) for one in policies)]
        for index, (start, stop, _) in enumerate(policies[0]["stretches"])
    ]
    columns = ("positions", *(_name(one) for one in policies))
    by = next((one["control"] for one in policies if one["control"]), None)
    caption = f"recompute: from a sample of the positions, by the difference to {by} there" if by else None
    return report.table("perplexity by position in the text", columns, rows, caption)


def _by_policy(policies: Sequence[Result]) -> Table:
    rows = [
        [
            _name(one),
            f"{one['read_tokens']:,}",
            f"{one['perplexity']:.2f}",
            _number(one["perplexity_of_sample"]),
            size_text(one["most_kv_bytes"]),
            _number(one["token_ms"][-1][1] if one["token_ms"] else None),
        ]
        for one in policies
    ]
    columns = ("policy", "tokens", "perplexity", "of the sample", "most KV", "ms a token")
    caption = (
        f"of the sample: the same {policies[0]['sample']} positions for all policies, as far as all of them read; "
        "ms: of one more token at the end of what was read"
    )
    return report.table("by policy", columns, rows, caption)


def _by_dtype(dtypes: Sequence[Result]) -> Table:
    greedy = "greedy_agreement" in dtypes[0]
    rows = []
    for one in dtypes:
        row = [one["kv_dtype"], f"{one['kl_mean']:.1e}", f"{one['agreement']:.2%}", f"{one['perplexity']:.3f}"]
        if greedy:
            row.append(f"{one['greedy_agreement']:.2%}")
            row.append(f"{one['greedy_same_prompts']} of {one['greedy_prompts']}")
        rows.append(row)
    columns = ["kv_dtype", "KL", "agreement", "perplexity", *["greedy", "same"] * greedy]
    caption = (
        "KL: of what is expected next from the same with float32, in nats; agreement: how often the most likely next "
        "token is the same; greedy: so of tokens that are generated; same: outputs without any other token"
    )
    return report.table("by kv_dtype, against float32; dense", columns, rows, caption)


def _by_shape(shapes: Sequence[Result]) -> Table:
    names = [f"{one['shape']}, {one['kv_heads']}{' (this model)' if one['of_this_model'] else ''}" for one in shapes]
    rows = [
        [dtype, *(size_text(one["bytes_per_token"][dtype]) for one in shapes)] for dtype in shapes[0]["bytes_per_token"]
    ]
    return report.table("keys and values of a token, by number of KV heads", ("kv_dtype", *names), rows)


def _lines(axes: Axes, policies: Sequence[Result], points: Callable[[Result], Sequence[Sequence[float]]]) -> None:
    for one, color in zip(policies, cycle(figures.COLORS), strict=False):
        found = points(one)
        axes.plot([x for x, _ in found], [y for _, y in found], color=color, label=_name(one))


def _bars(axes: Axes, shapes: Sequence[Result]) -> None:
    """A group of bars for each shape, a bar for each dtype."""
    dtypes = list(shapes[0]["bytes_per_token"])
    width = 0.8 / len(dtypes)
    for index, (dtype, fill) in enumerate(figures.fills_of(dtypes).items()):
        x = [shape + (index - (len(dtypes) - 1) / 2) * width for shape in range(len(shapes))]
        heights = [one["bytes_per_token"][dtype] / 1024 for one in shapes]
        bars = axes.bar(x, heights, width, color=fill, label=dtype)
        axes.bar_label(bars, fmt=figures.short, fontsize=8, rotation=90, padding=3)
    axes.set(title="Memory a token", ylabel="KiB of keys and values a token")
    axes.margins(y=0.12)
    axes.set_xticks(range(len(shapes)), [f"{one['shape']}: {one['kv_heads']} KV heads" for one in shapes])
    axes.legend()


def _middles(one: Result) -> list[tuple[float, float]]:
    return [((start + stop) / 2, value) for start, stop, value in one["stretches"] if value is not None]


def _name(one: Result) -> str:
    """A policy of many heads would fill the page."""
    name: str = one["policy"]
    return name if len(name) <= 30 else f"{name[:27]}..."


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"

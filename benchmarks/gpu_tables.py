"""Writes the GPU tables of benchmarks/README.md and kernels/README.md from what benchmarks/gpu_run.sh has measured.

    python benchmarks/gpu_tables.py                                       of all files in benchmarks/results/
    python benchmarks/gpu_tables.py benchmarks/results/FILE.json          of these files
    python benchmarks/gpu_tables.py FILE.json --print                     to the terminal, nothing is written

The tables stand between two comments, and are replaced in place; what has no result says "not measured yet". A figure
is never typed by hand. A rehearsal is refused by the two files of the repository; --readme and --kernels-readme name
others.
"""

import argparse
import json
import sys
from pathlib import Path

import gpu_rows

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
README, KERNELS_README = HERE / "README.md", HERE.parent / "kernels" / "README.md"
BEGIN, END = "<!-- gpu tables begin: python benchmarks/gpu_tables.py -->", "<!-- gpu tables end -->"
UNMEASURED = "not measured yet"
VERSIONS = ("driver", "torch", "triton", "python", "transformers", "peft", "bitsandbytes")
RUNS = {"running": "was cut off with the whole run"}  # statuses that need another word


class Run:
    """One file of results."""

    def __init__(self, content: dict):
        self.content = content
        self.records = {record["name"]: record for record in content["rows"]}
        self.environment = content["environment"]
        self.product = self.values("environment", "rates").get("flops_per_second")

    def settings(self, row: gpu_rows.Row) -> dict:
        return self.records.get(row.name, {}).get("settings", row.settings)

    def measurements(self, row: str) -> list[dict]:
        return self.records.get(row, {}).get("measurements", [])

    def values(self, row: str, name: str) -> dict:
        """Of a measurement that ended well."""
        for each in self.measurements(row):
            if each["name"] == name and each["status"] == "done":
                return each["values"]
        return {}

    def missing(self, row: str, name: str) -> str:
        """What a cell says that has no figure."""
        status = self.records.get(row, {}).get("status", "not run")
        status = next((each["status"] for each in self.measurements(row) if each["name"] == name), status)
        return status if status in ("failed", "killed", "left out") else UNMEASURED


def markdown(heading: list[str], rows: list[list[str]]) -> str:
    """A table, or nothing where it has no rows."""
    if not rows:
        return ""
    line = lambda cells: f"| {' | '.join(cells)} |"
    return "\n".join([line(heading), line(["---"] * len(heading)), *map(line, rows)])


# ------------------------------------------------------------------------------------------------------- the tables


def training_table(run: Run) -> str:
    heading = ["job", "a step", "ours: tokens/s", "MFU", "peak, GB", "foretold by --plan", "peer: tokens/s"]
    heading += ["peak, GB", "ours is", "of its memory"]
    rows = []
    for row in gpu_rows.ROWS:
        if row.function not in ("fine_tuning", "compiled_blocks", "full"):
            continue
        rows += [training_cells(run, row, name) for name in names_of_jobs(row, run)]
    return markdown(heading, [row for row in rows if row])


def names_of_jobs(row: gpu_rows.Row, run: Run) -> list[str]:
    settings = run.settings(row)
    kinds = settings.get("kinds", ("rows", "documents"))
    names = [f"{seq}, {kind}" for seq in settings["batches"] for kind in kinds]
    ways = {"compiled_blocks": ("lora", "qlora"), "full": gpu_rows.FULL_WAYS}.get(row.function, ())
    return [f"{way}, {name}" for way in ways for name in names] or names


def training_cells(run: Run, row: gpu_rows.Row, name: str) -> list[str]:
    """A line of the table; nothing where neither side has a figure."""
    ours = run.values(row.name, name)
    peer_row = f"{row.name}-peer"
    job = name.rpartition(", ")[0].rpartition(", ")[2] + ", " + name.rpartition(", ")[2]  # without the way
    has_peer = row.function == "fine_tuning" or name.startswith("all on the GPU")
    peer = run.values(peer_row, job) if has_peer else {}
    cells = [f"{row.what}: {said(name)}"]
    if not ours and not peer:
        return []
    if not ours:
        cells += ["", run.missing(row.name, name), "", "", ""]
    else:
        error = ours["planned"] / ours["peak"] - 1
        cells += [f"{ours['batch']} x {ours['seq']:,}", f"{ours['speed']:,.0f}", share_of_peak(run, ours)]
        cells += [f"{ours['peak'] / 1e9:.1f}", f"{ours['planned'] / 1e9:.1f} ({error:+.0%})"]
    if not has_peer:
        return [*cells, "", "", "", ""]
    if not peer:
        return [*cells, run.missing(peer_row, job), "", "", ""]
    how = ", gradient checkpointing" if peer["checkpointing"] else ""
    how += f", {peer['batch']} rows" if ours and peer["batch"] != ours["batch"] else ""
    cells += [f"{peer['speed']:,.0f}{how}", f"{peer['peak'] / 1e9:.1f}"]
    if not ours:
        return [*cells, "", ""]
    return [*cells, f"{ours['speed'] / peer['speed']:.2f} x", f"{ours['peak'] / peer['peak']:.2f}"]


def said(name: str) -> str:
    """A measurement's name in words: "2048, rows" is "full rows of 2,048"."""
    *way, seq, kind = name.split(", ")
    kinds = {"rows": f"full rows of {int(seq):,}", "documents": f"documents packed into rows of {int(seq):,}"}
    return ", ".join([*(gpu_rows.NAMES.get(each, f"`{each}`" if "--" in each else each) for each in way), kinds[kind]])


def share_of_peak(run: Run, values: dict) -> str:
    """Of the published dense bf16 rate, and of what a large product reached in the same run."""
    published = run.environment.get("published_flops")
    shares = [f"{values['flops_per_second'] / published:.0%}"] if published else []
    if run.product:
        shares.append(f"{values['flops_per_second'] / run.product:.0%} of a product's rate")
    return ", ".join(shares)


def decoding_table(run: Run) -> str:
    rows = []
    for row in gpu_rows.ROWS:
        if row.function != "decoding":
            continue
        for kind in ("bf16", "bf16 with LoRA", "NF4", "NF4 with LoRA"):
            for batch in run.settings(row)["batches"]:
                name = f"{kind}, batch {batch}"
                ours, peer = run.values(row.name, name), run.values(f"{row.name}-peer", name)
                if not ours and not peer:
                    continue
                cells = [f"{row.what}: {name}"]
                for side, values in ((row.name, ours), (f"{row.name}-peer", peer)):
                    cells.append(f"{values['speed']:,.0f}" if values else run.missing(side, name))
                rows.append([*cells, f"{ours['speed'] / peer['speed']:.2f} x" if ours and peer else ""])
    return markdown(["job", "ours: tokens/s", "transformers `generate`", "ours is"], rows)


def durability_table(run: Run) -> str:
    row = next(row for row in gpu_rows.ROWS if row.function == "durability")
    ways = {
        "plain": "full fine-tuning of the 1B shape",
        "fsdp": "`--shard full`, one process",
        "saved": "a checkpoint every 4 steps",
        "async": "the same with `--save-async`",
    }
    rows, plain = [], run.values(row.name, "plain")
    for way, what in ways.items():
        values = run.values(row.name, way)
        if values:
            ratio = f"{values['step'] / plain['step']:.2f}" if plain else ""
            rows.append([what, f"{1e3 * values['step']:,.0f} ms", ratio])
    return markdown(["sharded, and saved", "a step", "of plain"], rows)


def correctness_table(run: Run) -> str:
    names = [f"{method}, {dtype}" for method in gpu_rows.CORRECTNESS_RATE for dtype in gpu_rows.TOLERANCE]
    rows = []
    for name in names:
        for each in run.measurements("correctness"):
            if each["name"] == name and each["values"]:
                largest, tolerance = (f"{each['values'][key]:.1e}" for key in ("largest", "tolerance"))
                rows.append([name, largest, tolerance, "passed" if each["status"] == "done" else "FAILED"])
    heading = ["twenty steps against the CPU in fp32", "largest relative difference of a loss", "allowed", ""]
    return markdown(heading, rows)


def kernels_table(run: Run) -> str:
    found = {each["name"]: each["values"] for each in run.measurements("kernels") if each["status"] == "done"}
    rows = []
    for name, ways in found.items():
        times = [f"{1e3 * ways[way]['seconds']:.3f}" if way in ways else "" for way in ("ours", "plain", "compiled")]
        peaks = [f"{ways[way]['peak'] / 1e6:,.0f}" for way in ("ours", "plain", "compiled") if way in ways]
        rows.append([name, *times, " / ".join(peaks), f"{ways['ours']['error']:.1e}"])
        if "copy" in ways:
            share = f"{ways['copy']['seconds'] / ways['ours']['seconds']:.0%}"
            rows.append(["NF4 dequantise, share of a copy's bandwidth", share, *[""] * 4])
    return markdown(KERNELS_HEADING, rows)


KERNELS_HEADING = ["GPU: milliseconds, forward and backward", "ours", "reference", "compiled reference"]
KERNELS_HEADING += ["MB at the peak: ours, reference, compiled", "largest difference"]


# -------------------------------------------------------------------------------------------------- around the tables


def heading_of(run: Run) -> str:
    """Device, versions, command and date, in one sentence."""
    there = run.environment
    versions = ", ".join(f"{name} {there[name]}" for name in VERSIONS if name in there)
    if run.content["rehearsal"]:
        versions += ", TINY SHAPES, so that no figure here says anything of a job's name"
    return (
        f"**{there.get('device', 'unknown device')}**, {versions}; `{run.content['command']}`,"
        f" {run.content['date']}, commit {there.get('commit', 'unknown')}."
    )


def checks(run: Run) -> str:
    """Kernels that compile and tests that pass, counted."""
    launched = run.measurements("compile")
    tests = [each for each in run.measurements("tests") if each["values"].get("test")]
    count = lambda found, status: sum(each["status"] == status for each in found)
    there = run.environment.get("triton_launches")
    plain = "" if there is not False else " Triton could NOT launch kernels there: plain PyTorch computed everything."
    return (
        f"Of {len(launched)} kernel launches at the 8B shape {count(launched, 'done')} compiled and ended; of"
        f" {len(tests)} tests {count(tests, 'done')} passed, {count(tests, 'failed')} failed,"
        f" {count(tests, 'left out')} were skipped.{plain}"
    )


def shortfalls(run: Run) -> str:
    """A list of everything that failed or was not run, with why."""
    lines = []
    for row in gpu_rows.ROWS:
        record = run.records.get(row.name, {"status": "not run", "why": "", "measurements": []})
        if record["status"] != "done":
            status = RUNS.get(record["status"], record["status"])
            why = f": {plain_text(record['why'])}" if record["why"] else ""
            done = [each["name"] for each in record["measurements"] if each["status"] == "done"]
            kept = f"; measured before that: {'; '.join(done)}" if done else ""
            lines.append(f"- {row.name} ({row.what}): {status}{why}{kept}")
        for each in record["measurements"]:
            if each["status"] == "failed":
                lines.append(f"- {row.name}, {each['name']}: failed: {plain_text(each['error'])}")
    return "\n".join(["Failed, or not run:", "", *lines]) if lines else "Nothing failed, and all was run."


def plain_text(said: str) -> str:
    """On one line, without what Markdown would take for its own."""
    return " ".join(said.replace("|", "/").replace("<", "(").replace(">", ")").replace("`", "'").split())[:300]


def section(run: Run) -> str:
    tables = [training_table(run), decoding_table(run), durability_table(run), correctness_table(run)]
    return "\n\n".join([heading_of(run), *filter(None, tables), checks(run), shortfalls(run)])


def kernels_section(run: Run) -> str:
    return f"{heading_of(run)}\n\n{kernels_table(run) or f'The kernels: {UNMEASURED}.'}"


def unmeasured() -> str:
    """What stands there before any card was measured."""
    rows = [[row.name, row.what, UNMEASURED] for row in gpu_rows.ROWS]
    return markdown(["row", "what", "figures"], rows)


def unmeasured_kernels() -> str:
    rows = [["each of the above, 8B shape, 4,096 tokens", *[UNMEASURED] * 3, "", ""]]
    rows.append(["NF4 dequantise, share of a copy's bandwidth", UNMEASURED, *[""] * 4])
    return markdown(KERNELS_HEADING, rows)


def replaced(text: str, new: str, file: Path) -> str:
    """The text with what stands between the two comments replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        sys.exit(f"{file}: the comments {BEGIN} and {END} must stand in it once, in this order")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    return f"{before}{BEGIN}\n\n{new}\n\n{after}"


def tables_of(files: list[Path]) -> tuple[str, str]:
    """For benchmarks/README.md, and for kernels/README.md."""
    runs = [Run(json.loads(file.read_text())) for file in files]
    if not runs:
        return unmeasured(), unmeasured_kernels()
    return "\n\n".join(map(section, runs)), "\n\n".join(map(kernels_section, runs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", type=Path, nargs="*", help="of gpu_run.sh (default: all in benchmarks/results/)")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--kernels-readme", type=Path, default=KERNELS_README)
    parser.add_argument("--print", action="store_true", help="print the tables; write nothing")
    args = parser.parse_args()
    files = args.files or sorted(RESULTS.glob("*.json"))
    rehearsed = any(json.loads(file.read_text())["rehearsal"] for file in files)
    for readme, new in zip((args.readme, args.kernels_readme), tables_of(files), strict=True):
        if args.print:
            print(new, end="\n\n")
            continue
        if rehearsed and readme.resolve() in (README, KERNELS_README):
            sys.exit(f"{readme}: is for measurements on a GPU, and this is a rehearsal; --readme names another file")
        readme.write_text(replaced(readme.read_text(), new, readme))
        print(f"written   {readme}")


if __name__ == "__main__":
    main()

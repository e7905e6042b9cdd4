"""The log-likelihoods and scores of lm-evaluation-harness on local files: the oracle of tests/test_choices.py.

    python tests/support/harness_scores.py SPEC.json OUT.json

Run in a process of its own from another directory: it imports the package `evaluate`, whose name evaluate.py has here.
SPEC: {"model": folder, "dtype": "float32", "device": "cpu", "batch_size": N, "tasks": {name: {"config": a YAML file of
the harness' own tasks, "data": file, "shots": N, "shots_data": file, "metrics": [...]}}}; the files are JSON Lines as
Hugging Face's datasets have them.
OUT: {"seconds": for all tasks, without loading the model, "tasks": {name: {"likelihoods": [[log-likelihood of each
choice] of each item], "items": {metric: [of each item]}, "scores": {metric: mean, metric_stderr: its standard
error}}}}.
"""

import json
import sys
import time
from pathlib import Path

sys.path.pop(0)  # this folder: nothing of the project is imported here

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

TASKS = Path(lm_eval.__file__).parent / "tasks"


def task_config(name: str, spec: dict) -> dict:
    """The harness' own configuration of a task, with local files in place of those of the Hub."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(TASKS / spec["config"], resolve_func=True)
    files = {"test": str(spec["data"])}
    config |= {"task": name, "dataset_path": "json", "dataset_name": None, "test_split": "test"}
    config |= {"training_split": None, "validation_split": None, "fewshot_split": None}
    if spec.get("shots"):
        files["dev"] = str(spec["shots_data"])
        config |= {"fewshot_split": "dev", "fewshot_config": {"sampler": "first_n", "split": "dev"}}
    if "metrics" in spec:
        aggregation = {"aggregation": "mean", "higher_is_better": True}
        config["metric_list"] = [{"metric": metric} | aggregation for metric in spec["metrics"]]
    config["dataset_kwargs"] = {"data_files": files}
    config["num_fewshot"] = spec.get("shots", 0)
    config.pop("tag", None)
    return config


def main(spec_file: str, out_file: str) -> None:
    spec = json.loads(Path(spec_file).read_text(encoding="utf-8"))
    model = HFLM(
        spec["model"],
        dtype=spec.get("dtype", "float32"),
        device=spec.get("device", "cpu"),
        batch_size=spec.get("batch_size", 8),
    )
    # The configurations are given whole: to index those of the harness takes six seconds.
    manager = TaskManager(include_defaults=False)
    start = time.perf_counter()
    tasks = manager.load([task_config(name, task) for name, task in spec["tasks"].items()])
    # All tasks at once, so that the harness may batch them together; without simple_evaluate, which asks pip for
    # all packages that are installed.
    found = lm_eval.evaluate(lm=model, task_dict=tasks, bootstrap_iters=2)
    seconds = time.perf_counter() - start
    results = {}
    for name in spec["tasks"]:
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        metrics = samples[0]["metrics"]
        scores = {}
        for key, value in found["results"][name].items():
            metric, _, _ = key.partition(",")
            if metric.removesuffix("_stderr") in metrics:
                scores[metric] = value
        results[name] = {
            "likelihoods": [[answer[0] for answer in sample["filtered_resps"]] for sample in samples],
            "items": {metric: [float(sample[metric]) for sample in samples] for metric in metrics},
            "scores": scores,
        }
    output = {"seconds": seconds, "tasks": results}
    Path(out_file).write_text(json.dumps(output), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The comparison as tables and findings; every figure also in results.json."""

from typing import Any

from mmkernels.demo.pruning.arms import ARMS
from mmkernels.demo.pruning.measure import PATCHES, standard_error
from mmkernels.demo.pruning.pictures import TITLES

QUARTER = PATCHES // 4


def table(results: dict[str, Any], kind: str) -> str:
    """One row a pruner: accuracy at each number of kept tokens."""
    counts = list(results["pruned"]["vtc_cls"][kind])
    lines = [
        f"| {TITLES[kind]} | {PATCHES} | " + " | ".join(str(k) for k in counts) + " |",
        "|---" * (len(counts) + 2) + "|",
    ]
    whole = f"{results['unpruned'][kind]:.3f}"
    for arm in ARMS:
        values = results["pruned"][arm.key][kind].values()
        cells = ["-" if value is None else f"{value:.3f}" for value in values]
        lines.append(f"| {arm.label} | {whole} | {' | '.join(cells)} |")
    return "\n".join(lines)


def mass_table(results: dict[str, Any]) -> str:
    """[CLS]'s attention to patches with ink, by layer."""
    mass = results["cls_mass"]
    head = " | ".join(f"layer {layer}" for layer in range(len(mass["layers"])))
    values = " | ".join(f"{value:.2f}" for value in mass["layers"])
    return (
        f"| | uniform attention | {head} |\n{'|---' * (len(mass['layers']) + 2)}|\n"
        f"| mass on patches with ink | {mass['uniform']:.2f} | {values} |"
    )


def answer_table(results: dict[str, Any]) -> str:
    """Presence at a quarter of the tokens, apart for what is there and what is not."""
    names = {
        "all": "all tokens",
        "vtc_cls": f"VTC-CLS, {QUARTER} tokens",
        "random": f"random, {QUARTER} tokens (one draw)",
    }
    lines = ["| presence | class is there | is not there | a patch of it is kept |", "|---|---|---|---|"]
    for key, row in results["by_answer"].items():
        lines.append(f"| {names[key]} | {row['there']:.3f} | {row['not there']:.3f} | {row['seen']:.3f} |")
    return "\n".join(lines)


def findings(results: dict[str, Any]) -> list[tuple[str, bool]]:
    """What the demo sets out to show, and whether this run showed it."""
    mass, pruned = results["cls_mass"], results["pruned"]
    last = mass["layers"][-1]
    found = [
        (
            f"[CLS] of the last layer puts {last:.0%} of its attention on patches with ink, uniform attention would "
            f"put {mass['uniform']:.0%}",
            last > 1.5 * mass["uniform"],
        )
    ]
    whole = results["unpruned"]["present"]
    if QUARTER in pruned["random"]["present"]:
        ours, drawn, least = (pruned[key]["present"][QUARTER] for key in ("vtc_cls", "random", "least_cls"))
        found += [
            (
                f"presence, {QUARTER} of {PATCHES} tokens: VTC-CLS {ours:.1%} is 5 points or more above random "
                f"{drawn:.1%}",
                ours - drawn >= 0.05,
            ),
            (f"and within 2 points of all tokens ({whole:.1%})", whole - ours <= 0.02),
            (f"the patches [CLS] attends to least are worth less than random ones ({least:.1%})", least < drawn),
        ]
    most = max(pruned["vtc_cls"]["count"])
    failed, control = pruned["vtc_cls"]["count"][most], pruned["random"]["count"][most]
    text = (
        f"counting fails as it is known to: with {most} of {PATCHES} tokens VTC-CLS counts {failed:.1%} right, random "
        f"{control:.1%}, all tokens {results['unpruned']['count']:.1%}"
    )
    found.append((text, results["unpruned"]["count"] - failed > 0.1))
    return found


def markdown(results: dict[str, Any], curves: str, lit: str) -> str:
    """table.md."""
    settings, facts = results["settings"], results["machine"]
    goals = "\n".join(f"- {'shown' if met else 'NOT SHOWN'}: {text}" for text, met in findings(results))
    error = standard_error(results["unpruned"]["present"], settings["questions"])
    guess = ", ".join(f"{TITLES[kind]} {value:.3f}" for kind, value in results["guess"].items())
    tables = "\n\n".join(table(results, kind) for kind in TITLES)
    about = (
        f"A LLaVA of {results['parameters']:,} parameters ({results['vision_parameters']:,} of them a vision "
        "transformer with [CLS] over 36 patches), trained on\ncanvases of real scans with all tokens, then pruned by "
        f"`mmkernels.prune`. {settings['questions']:,} unseen questions of each kind, the same for\nall pruners; the "
        f"standard error of the unpruned presence score is {error:.3f}. Always giving the most common answer\n"
        f"scores: {guess}."
    )
    return f"""# Which visual tokens to keep: accuracy without retraining

{about}

{tables}

Random is the mean of {settings["random_seeds"]} draws. "which" counts a set as right when every class in it is. The
budget of FastV counts what layer 2 of 0 .. 2 reads; the layers before it read all 36. ToMe inside the encoder
can at most halve the tokens in each of three layers, hence the dashes.

{mass_table(results)}

{answer_table(results)}

{goals}

![accuracy against kept tokens]({curves})

![kept patches, lit]({lit})

The counting table is a failure of pruning by attention, not of this run: a reader this small counts by the share of
matching tokens, and pruning what is not attended to changes all shares.

- machine: {facts["processor"]}, {facts["cores"]} cores, {results["threads"]} threads; {results["load"]}
- training {results["training_seconds"]:.0f} s, all of it {results["seconds"]:.0f} s
- versions: {", ".join(f"{name} {facts[name]}" for name in ("python", "torch", "transformers", "mmkernels"))}
- data: {settings["source"]}; {settings["steps"]} steps of {settings["batch_size"]} questions, peak learning rate \
{settings["learning_rate"]}, seed {settings["seed"]}
- command: `{results["command"]}`
"""

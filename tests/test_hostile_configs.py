"Fields of config.json that hold what they never should: a sentence, in every family, and never another error."
import pytest
from test_families import CASES

from qkrestore_nb.checkpoints import CheckpointError
from qkrestore_nb.families import Selection, disagreement, family_of, layer_kinds, places, proposal

STRANGE = [None, 0, -1, 2.5, float("nan"), True, "x", [], [1], [None], [[]], [-1], {}, {"x": []}, {"rope_type": 5}]
ALWAYS = """num_hidden_layers num_attention_heads head_dim hidden_size num_mem_blocks rope_parameters rope_scaling
text_config sliding_window layer_types model_type architectures""".split()


def fields(family: dict) -> list[str]:
    said = [rule.get(k) for rule in family["kinds_from"] for k in ("field", "period", "offset", "indices")]
    return sorted({name.split(".")[0] for name in said if isinstance(name, str)} | set(ALWAYS))


@pytest.mark.parametrize("case", [c for c in CASES if "," not in c])
def test_a_sentence_or_nothing(case):
    config = {"model_type": case, **CASES[case][0]}
    choice, refusals = Selection(**CASES[case][1]), 0
    for field in fields(family_of(config)):
        for value in STRANGE:
            changed = config | {field: value}
            for look in (
                lambda: layer_kinds(changed), lambda: places(changed, choice), lambda: proposal(changed),
                lambda: disagreement(config, changed), lambda: disagreement(changed, config),
            ):
                try: look()
                except CheckpointError as e:
                    refusals += 1
                    assert len(str(e)) <= 170 and "has no None" not in str(e), e
    assert refusals > 20


@pytest.mark.parametrize("case, fields, says", [
    ("jamba", dict(attn_layer_period=0), "no attn_layer_period that says which layers are softmax"),
    ("jamba", dict(attn_layer_period=-2), "no attn_layer_period that says which layers are softmax"),
    ("zamba2", dict(num_mem_blocks=0), "num_mem_blocks of config.json is 0: give 1 to 3"),
    ("zamba2", dict(num_mem_blocks=[2]), r"num_mem_blocks of config.json is \[2\]"),
    ("jamba", dict(rope_parameters=["default"]), "rope_parameters of config.json is .*, which is no object"),
    ("jamba", dict(rope_scaling="yarn"), "rope_scaling of config.json is 'yarn', which is no object"),
])
def test_what_is_said(case, fields, says):
    config = {"model_type": case, **CASES[case][0]}
    changed = config | fields
    with pytest.raises(CheckpointError, match=says):
        layer_kinds(changed), places(changed, Selection()), disagreement(config, changed)

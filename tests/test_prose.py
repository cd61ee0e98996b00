"Needles in prose: the prompts are RULER's, they fill what they should, and bad input is said."
import random

import pytest

from qkrestore_nb.prose import check_tokenizer, count_tokens, haystack, kinds, local_keys, local_text, prose_test, score, sentences


@pytest.fixture(scope="module")
def ruler():
    "lm-eval's generator of needles. It asks for a download when it is imported, in vain."
    nltk = pytest.importorskip("nltk")
    pytest.importorskip("lm_eval")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk, "download", lambda *_, **__: False)
        from lm_eval.tasks.ruler import niah_utils, prepare_niah
    return niah_utils, prepare_niah


@pytest.mark.parametrize("kind", kinds)
def test_prompts_are_lm_evals(kind, ruler, monkeypatch):
    "Fifty prompts of each kind, character by character, from the same random numbers, words, essay and sentence splitter."
    tasks, prepare = ruler
    spec, essay = kinds[kind], list(local_text()[:6000])
    monkeypatch.setattr(prepare, "cached_sent_tokenize", sentences)
    args = dict(type_haystack=spec["haystack"], type_needle_k=spec["key"], type_needle_v=spec["value"], num_needle_k=spec.get("keys", 1), num_needle_v=spec.get("values", 1), num_needle_q=spec.get("queries", 1))
    hay = essay if spec["haystack"] == "essay" else prepare.get_haystack(type_haystack=spec["haystack"])
    for seed in range(50):
        size = 400 + 37 * seed if spec["haystack"] == "essay" else 5 + seed
        random.seed(seed)
        text, answers, query = prepare.generate_input_output(size, hay, template=tasks.TEMPLATE, **args)
        ours = haystack(kind, size, random.Random(seed), text=essay, words=prepare.WORDS)
        asked = ours["questions"][0]
        assert ours["context"] + asked["question"] == text and asked["answers"] == answers
        few = spec.get("queries", 1) * spec.get("values", 1) == 1
        value = spec["value"][:-1] if few else spec["value"]
        assert asked["prefix"] == f"The special magic {value} for {query} mentioned in the provided text {'is' if few else 'are'}"


@pytest.mark.parametrize("kind", kinds)
def test_a_haystack_is_as_long_as_asked_for_and_holds_its_needles(kind, tokenizer):
    many = 3 if kind in ("multikey_1", "multikey_2", "multikey_3") else 1
    for T in (1024, 4096):
        for hay in prose_test(kind, tokenizer, T, 3, many, seed=1):
            assert len(hay["questions"]) == many and count_tokens(tokenizer, hay) == hay["tokens"]
            step = 3 * 60 if kinds[kind]["haystack"] != "essay" else 120  # a line, a sentence of this text
            assert T - 128 - step < hay["tokens"] <= T - 128
            for q in hay["questions"]:
                assert all(hay["context"].count(f"is: {a}.") == 1 for a in q["answers"])
                assert score(" and ".join(q["answers"]).upper(), q["answers"]) == 1 and score("none of them", q["answers"]) == 0


def test_needles_stand_everywhere_and_questions_differ(tokenizer):
    depths = [d for hay in prose_test("single_2", tokenizer, 1024, 60) for d in hay["depths"]]
    assert min(depths) < .1 and max(depths) > .9 and .35 < sum(depths) / 60 < .65
    hays = prose_test("multikey_2", tokenizer, 2048, 4, 8)
    for hay in hays: assert len({q["answers"][0] for q in hay["questions"]}) == 8
    assert len({hay["context"] for hay in hays}) == 4
    assert prose_test("multikey_2", tokenizer, 2048, 4, 8) == hays and prose_test("multikey_2", tokenizer, 2048, 4, 8, seed=1) != hays


def test_keys_never_repeat_in_a_large_haystack():
    hay = haystack("multikey_2", 12000, random.Random(0))
    keys = [line.split(" for ")[1].split(" is: ")[0] for line in hay["context"].split("\n") if line.startswith("One of")]
    assert len(set(keys)) == len(keys) == 12001 and len(set(local_keys())) == len(local_keys())


def test_bad_input(tokenizer):
    for call, says in ((lambda: haystack("multikey_9", 10, random.Random(0)), "choose from single_1"), (lambda: haystack("multivalue", 2, random.Random(0)), "hides 4 needles"),
                       (lambda: haystack("single_1", 10, random.Random(0), 2), "has 1 questions to ask"), (lambda: haystack("multikey_2", 10, random.Random(0), words=["a", "b"]), "give more words"),
                       (lambda: prose_test("single_2", tokenizer, 100, 1), "ask for more"), (lambda: prose_test("nothing", tokenizer, 1000, 1), "choose from")):
        with pytest.raises(ValueError, match=says): call()


def test_a_tokenizer_that_cannot_spell_is_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({"One": 0, "of": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="cannot spell it"): check_tokenizer(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>"))

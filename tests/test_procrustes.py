"QK-Pro on folders, with bad input, and against brute force; the claims about the method itself are cells of chapter 09."
import hashlib
import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qkrestore_nb.checkpoints import CheckpointError
from qkrestore_nb.experiment import pair
from qkrestore_nb.hypenet import HypeNetForCausalLM
from qkrestore_nb.procrustes import _assign, procrustes_align, qk_pro, solve_queries
from qkrestore_nb.restore import qk_restore

FORMS = [dict(), dict(per="kv_head"), dict(space="head")]


def hashes(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def folders(tmp_path):
    for name in ("pre", "post"): shutil.copytree(pair() / name, tmp_path / name)
    before = {n: hashes(tmp_path / n) for n in ("pre", "post")}
    yield tmp_path / "pre", tmp_path / "post"
    if not (tmp_path / "changed").exists(): assert {n: hashes(tmp_path / n) for n in ("pre", "post")} == before, "an input was changed"


def state(folder): return load_file(folder / "model.safetensors")


def config(folder): return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("form", FORMS)
def test_folders_equal_state_dicts_and_models(folders, tmp_path, form):
    pre, post = folders
    done = qk_pro(pre, post, out=tmp_path / "out", lam=.1, **form)
    by_dict = qk_pro(state(pre), state(post), lam=.1, config=config(post), **form)
    a = state(done)
    assert a.keys() == by_dict.keys() and all(torch.equal(a[n], by_dict[n]) for n in a)
    moved = {n for n, t in state(post).items() if not torch.equal(t, a[n])}
    assert moved == {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (1, 2) for p in "qk"}
    assert {p.name for p in done.iterdir()} == {p.name for p in post.iterdir()} | {"qk_restore.json"}
    assert HypeNetForCausalLM.from_pretrained(done).config.mixer_types == config(post)["mixer_types"]


def test_both_ends_of_lam(folders):
    pre, post = (state(f) for f in folders)
    c = config(folders[1])
    both = lambda a, b: all(torch.equal(a[n], b[n]) for n in a)
    assert both(qk_pro(pre, post, lam=0., space="head", config=c), qk_restore(pre, post, config=c))
    for form in FORMS: assert both(qk_pro(pre, post, lam=float("inf"), config=c, **form), qk_restore(pre, post, projections="k", config=c))


@pytest.mark.parametrize("how, word", [(dict(lam=-1.), "lam"), (dict(lam=float("nan")), "lam"), (dict(space="key"), "space"), (dict(per="layer"), "per"),
                                       (dict(dtype="int8"), "dtype"), (dict(layers=[0]), "linear"), (dict(layers=[99]), "99")])
def test_choices_that_cannot_be(folders, tmp_path, how, word):
    with pytest.raises(CheckpointError, match=word): qk_pro(*folders, out=tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


def spoil(folder, name, change):
    tensors = state(folder)
    change(tensors, name)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder.parent / "changed").touch()


Q1, K2 = "model.layers.1.self_attn.q_proj.weight", "model.layers.2.self_attn.k_proj.weight"


@pytest.mark.parametrize("which, name, change, word", [
    (0, K2, lambda t, n: t[n].view(-1)[5:6].fill_(float("nan")), "NaN or inf"), (1, Q1, lambda t, n: t[n].view(-1)[:1].fill_(float("inf")), "NaN or inf"),
    (0, Q1, lambda t, n: t.pop(n), "no tensor"), (1, Q1, lambda t, n: t.update({n: t[n][:64].clone()}), "shape"),
    (0, K2, lambda t, n: t.update({n: t[n].float()}), "dtype")])
def test_weights_that_cannot_be_leave_nothing_behind(folders, tmp_path, which, name, change, word):
    spoil(folders[which], name, change)
    before = [hashes(f) for f in folders]
    with pytest.raises(CheckpointError, match=word) as e: qk_pro(*folders, out=tmp_path / "out")
    assert name in str(e.value)
    assert [hashes(f) for f in folders] == before
    assert {p.name for p in tmp_path.iterdir()} == {"pre", "post", "changed"}, "something half-written was left"


def test_outputs_and_kinds(folders, tmp_path):
    pre, post = folders
    with pytest.raises(CheckpointError, match="out="): qk_pro(pre, post)
    with pytest.raises(CheckpointError, match="in place"): qk_pro(pre, post, out=tmp_path / "out", inplace=True)
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="there"): qk_pro(pre, post, out=tmp_path / "there")
    with pytest.raises(CheckpointError, match="one kind"): qk_pro(pre, state(post))
    with pytest.raises(CheckpointError, match="config="): qk_pro(state(pre), state(post))
    with pytest.raises(CheckpointError, match="latent attention"): qk_pro(state(pre), state(post), config=config(post) | {"kv_lora_rank": 64})


def test_keys_without_full_rank_take_the_pseudo_inverse():
    torch.manual_seed(0)
    k = torch.randn(8, 32, dtype=torch.float64)
    k[5] = k[1] + k[2]
    pre, post = torch.randn(2, 16, 32, dtype=torch.float64)
    with pytest.warns(UserWarning, match="pseudo-inverse"): q = solve_queries(pre, post, k, 2, lam=0., dtype=torch.float64)
    torch.testing.assert_close(q @ k.mT, pre @ k.mT)
    torch.testing.assert_close(q, post + (pre - post) @ torch.linalg.pinv(k) @ k)


def test_no_rival_keeps_the_logits_nearer_to_post():
    torch.manual_seed(0)
    k, pre, post = torch.randn(8, 32).double(), torch.randn(16, 32).double(), torch.randn(16, 32).double()
    q = solve_queries(pre, post, k, 2, lam=0., dtype=torch.float64)
    null = torch.linalg.svd(k)[2][8:]  # what the keys do not read: only there may a rival differ
    for _ in range(2000):
        rival = q + torch.randn(16, 24).double() @ null * 10 ** torch.empty(1).uniform_(-4, 1).double()
        assert (rival - post).norm() > (q - post).norm()


def test_the_assignment_is_the_best_of_all():
    torch.manual_seed(0)
    for n in (1, 2, 3, 5, 6):
        for _ in range(20):
            score = torch.randn(n, n)
            p = _assign(score)
            best = max(sum(score[i, j] for i, j in enumerate(order)) for order in itertools.permutations(range(n)))
            assert sorted(p.tolist()) == list(range(n)) and abs(score[range(n), p].sum() - best) < 1e-5


def test_signs_find_what_was_flipped_and_exchanged():
    torch.manual_seed(0)
    D, n_kv = 6, 2
    q, k = torch.randn(4 * D, 32), torch.randn(n_kv * D, 32)
    gains = torch.tensor([1., 1., 2., 2., 2., 3.])
    A = torch.zeros(n_kv, D, D)
    for h, (order, signs) in enumerate((([1, 0, 4, 2, 3, 5], [1, -1, 1, 1, -1, -1]), ([0, 1, 3, 2, 4, 5], [-1, -1, 1, -1, 1, 1]))):
        A[h, range(D), order] = torch.tensor(signs, dtype=torch.float)
    turn = lambda w: (A.mT[:, None] @ w.unflatten(0, (n_kv, -1, D))).flatten(0, 2)
    found = procrustes_align(q, k, turn(q) + .01 * torch.randn_like(q), turn(k) + .01 * torch.randn_like(k), n_kv, "signs", gains)
    assert torch.equal(found[2], A)
    torch.testing.assert_close(found[0], turn(q))


def test_a_ridge_that_float32_cannot_see():
    "So small that Cholesky's float32 would lose it, and of the size of the smaller eigenvalue: the literal formula in float64."
    g = torch.Generator().manual_seed(0)
    (q_pre, q_post), rows = torch.randn(2, 2, 8, generator=g), torch.linalg.qr(torch.randn(8, 2, generator=g))[0].T
    k, lam = torch.tensor([[1.], [3e-4]]) * rows, 1e-7
    K, delta = k.double(), (q_pre - q_post).double()
    gram = K @ K.T
    shift = lam * gram.diagonal().mean()
    literal = q_post.double() + delta @ K.T @ torch.linalg.inv(gram + shift * torch.eye(2)) @ K
    made = solve_queries(q_pre, q_post, k, n_kv=1, lam=lam)
    torch.testing.assert_close(made.double(), literal, rtol=1e-3, atol=1e-4)

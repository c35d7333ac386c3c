"""Masks and spans: the published rule to the token, brute force, every adapter, bad input."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkernels import (
    ConfigError,
    DataError,
    DtypeError,
    MMAMask,
    ShapeError,
    build_mutual_spans,
    check_no_label_leak,
    mma_mask,
)

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
IMAGE, TAG, ANSWER = 9, 3, 8


def ids(text):
    """Letters to ids: i image, t text, A assistant tag, a answer, . padding."""
    return torch.tensor([[{"i": IMAGE, "t": 5, "A": TAG, "a": ANSWER, ".": 0}[c] for c in row] for row in text.split()])


def spans_of(text, **options):
    found = build_mutual_spans(ids(text), image_token_id=IMAGE, prompt_end_token_id=TAG, **options)
    return [tuple(span) for span in found.tolist()]


def test_golden_mask_of_the_authors():
    # Their preprocessing of [bos, sys, t, usr, <image>, t, t, <assistant>, a, eos] with 3 visual tokens.
    unexpanded = torch.tensor([[1, 32006, 50, 32010, 32012, 51, 52, 32001, 60, 32000]])
    spans = build_mutual_spans(unexpanded, image_token_id=32012, prompt_end_token_id=32001, num_image_tokens=3)
    assert spans.tolist() == [[0, 4, 7, 7, 10]]
    kept = mma_mask(12, spans=spans).dense()[0]
    expected = torch.ones(12, 12).tril().bool()
    expected[4:7, 7:10] = True
    assert torch.equal(kept, expected)
    assert kept.sum() == 87


def test_the_assistant_tag_is_read_unless_excluded():
    assert spans_of("tiittAaa") == [(0, 1, 3, 3, 6)]  # the tag is token 5: the off-by-one of the released weights
    assert spans_of("tiittAaa", include_prompt_end=False) == [(0, 1, 3, 3, 5)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tttttt", []),  # no image
        ("tiitttt", []),  # no tag: a caption or a truncated prompt stays causal
        ("ttAiit", []),  # the tag before the image
        ("tiiAaa", [(0, 1, 3, 3, 4)]),  # nothing but the tag
        ("tiAtiA", [(0, 1, 2, 2, 3), (0, 4, 5, 5, 6)]),  # two turns, an image in each
        ("tiitAatttAa", [(0, 1, 3, 3, 5)]),  # the second question is not read by the image of the first
        ("itittA", [(0, 0, 1, 1, 2), (0, 0, 1, 3, 6), (0, 2, 3, 3, 6)]),  # two images before one question
        ("tiitA... tiiAa...", [(0, 1, 3, 3, 5), (1, 1, 3, 3, 4)]),
    ],
)
def test_spans_of_prompts(text, expected):
    rows = ids(text)
    assert spans_of(text, attention_mask=rows != 0) == expected


def test_own_segment_stops_at_the_next_image():
    assert spans_of("titittA", policy="own_segment") == [(0, 1, 2, 2, 3), (0, 3, 4, 4, 7)]
    assert spans_of("titittA", policy="none") == []


def test_left_padding_moves_spans_and_hides_padding():
    rows = ids("...tiitAa ttiitttAa".replace("ttiitttAa", "tiittttAa"))
    valid = rows != 0
    found = build_mutual_spans(rows, image_token_id=IMAGE, prompt_end_token_id=TAG, attention_mask=valid)
    assert found.tolist() == [[0, 4, 6, 6, 8], [1, 1, 3, 3, 8]]
    kept = mma_mask(9, spans=found, attention_mask=valid).dense()
    assert not kept[0, :3].any()
    assert not kept[0, :, :3].any()
    alone = mma_mask(6, spans=[(0, 1, 3, 3, 5)]).dense()[0]
    assert torch.equal(kept[0, 3:, 3:], alone)


def test_modality_ids_with_labels_end_each_turn_at_its_answer():
    types = torch.tensor([[0, 1, 1, 0, 0, 0, 0, 0, 2, 0, 0]])
    labels = torch.tensor([[-100, -100, -100, -100, -100, 7, 7, -100, -100, -100, 7]])
    found = build_mutual_spans(mm_token_type_ids=types, labels=labels)
    assert found.tolist() == [[0, 1, 3, 3, 5], [0, 8, 9, 9, 10]]
    check_no_label_leak(labels, mma_mask(11, spans=found))


def test_context_mask_and_adjacent_modalities():
    types = torch.tensor([[1, 1, 2, 0, 0, 0]])
    context = torch.tensor([[1, 1, 1, 1, 0, 1]]).bool()
    found = build_mutual_spans(mm_token_type_ids=types, context_mask=context)
    assert found.tolist() == [[0, 0, 2, 3, 4], [0, 0, 2, 5, 6], [0, 2, 3, 3, 4], [0, 2, 3, 5, 6]]


def test_packed_documents_keep_to_themselves():
    rows, bounds = ids("tiitAtitAa"), torch.tensor([0, 5, 10])
    found = build_mutual_spans(rows, image_token_id=IMAGE, prompt_end_token_id=TAG, cu_seqlens=bounds)
    assert found.tolist() == [[0, 1, 3, 3, 5], [0, 6, 7, 7, 9]]
    packed = mma_mask(10, spans=found, cu_seqlens=bounds).dense()[0]
    parts = [mma_mask(5, spans=[s]).dense()[0] for s in ((0, 1, 3, 3, 5), (0, 1, 2, 2, 4))]
    assert torch.equal(packed, torch.block_diag(*(p.int() for p in parts)).bool())
    # an image at the end of a document does not read the next one, even without any end of prompt
    open_ended = build_mutual_spans(ids("ttittttttt"), image_token_id=IMAGE, cu_seqlens=torch.tensor([0, 3, 10]))
    assert open_ended.tolist() == []


def test_a_tag_of_several_tokens():
    rows = torch.tensor([[9, 5, 3, 4, 8], [9, 3, 5, 4, 8]])
    found = build_mutual_spans(rows, image_token_id=9, prompt_end_token_id=[3, 4])
    assert found.tolist() == [[0, 0, 1, 1, 4]]


def test_chunks_and_caches():
    spans = [(0, 2, 4, 4, 6)]
    whole = mma_mask(10, spans=spans).dense()[0]
    for start, stop in ((0, 6), (0, 7), (2, 6), (1, 10)):
        past_part = mma_mask(stop - start, stop, spans=spans).dense()[0]
        assert torch.equal(past_part, whole[start:stop, :stop]), (start, stop)
    assert torch.equal(mma_mask(4, 10, spans=spans).dense()[0], whole[6:])  # the span is in the cache
    assert torch.equal(mma_mask(1, 10, spans=spans).dense()[0], whole[9:])
    for start, stop in ((3, 7), (4, 8), (5, 6)):
        with pytest.raises(ConfigError, match=r"chunk must not start inside a span.*Prefill up to"):
            mma_mask(stop - start, stop, spans=spans)
    with pytest.raises(ShapeError, match=r"contain the whole span"):
        mma_mask(5, 5, spans=spans)


def test_static_cache_has_room_behind_the_rows():
    mask = mma_mask(3, 10, past_length=2, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 0, 0, 0, 0, 0]]))
    assert (mask.row_start.tolist(), mask.row_end.tolist()) == ([[1, 1, 1]], [[3, 4, 5]])


@st.composite
def situations(draw):
    """Arguments of mma_mask and the same mask by the formula, pair by pair."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    past = draw(st.integers(0, length - 1))
    causal, window = draw(st.booleans()), draw(st.sampled_from([None, None, 1, 5]))
    pads = [(draw(st.integers(0, length)), draw(st.integers(0, length))) for _ in range(batch)]
    valid = torch.tensor([[int(a <= j < length - z) for j in range(length)] for a, z in pads])
    spans = []
    for _ in range(draw(st.integers(0, 4))):
        b = draw(st.integers(0, batch - 1))
        q0, k0 = draw(st.integers(past, length - 1)), draw(st.integers(0, length - 1))
        q1, k1 = draw(st.integers(q0 + 1, length)), draw(st.integers(k0 + 1, length))
        if k1 > q0 or not causal or window:
            spans.append((b, q0, q1, k0, k1))
    options = {"causal": causal, "window": window, "attention_mask": valid, "spans": spans}
    kept = torch.zeros(batch, length - past, length, dtype=torch.bool)
    for b in range(batch):
        for i in range(past, length):
            for j in range(length):
                near = (j <= i or not causal) and (window is None or abs(i - j) < window)
                opened = any(b == s and q0 <= i < q1 and k0 <= j < k1 for s, q0, q1, k0, k1 in spans)
                kept[b, i - past, j] = bool(valid[b, i] and valid[b, j] and (near or opened))
    if not causal and past:  # rows of cross-attention are no positions: none of them is padding
        kept = None
    return batch, length - past, length, options, kept


@PROPERTY
@given(situation=situations())
def test_equals_the_formula(situation):
    batch, qlen, klen, options, kept = situation
    mask = mma_mask(qlen, klen, batch=batch, **options)
    if kept is not None:
        assert torch.equal(mask.dense(), kept)
    assert abs(mask.live_share() - mask.dense().float().mean().item()) < 1e-6


@PROPERTY
@given(situation=situations(), block_q=st.integers(1, 9), block_k=st.integers(1, 9))
def test_tiles_are_what_the_dense_mask_says(situation, block_q, block_k):
    batch, qlen, klen, options, _ = situation
    mask = mma_mask(qlen, klen, batch=batch, **options)
    live, full = mask.tiles(block_q, block_k)
    dense = mask.dense()
    for m in range(live.shape[1]):
        for n in range(live.shape[2]):
            tile = dense[:, m * block_q : (m + 1) * block_q, n * block_k : (n + 1) * block_k].flatten(1)
            assert torch.equal(live[:, m, n], tile.any(1))
            assert not (full[:, m, n] & ~tile.all(1)).any()
            if not options["spans"]:
                assert torch.equal(full[:, m, n], tile.all(1))


@PROPERTY
@given(situation=situations(), seed=st.integers(0, 1000))
def test_label_leaks_are_what_the_dense_mask_says(situation, seed):
    batch, qlen, klen, options, _ = situation
    if qlen != klen:
        return
    mask = mma_mask(qlen, klen, batch=batch, **options)
    labels = torch.where(torch.rand(batch, klen, generator=torch.Generator().manual_seed(seed)) < 0.1, 4, -100)
    ahead = mask.dense() & (torch.arange(klen) > torch.arange(qlen)[:, None])
    if (ahead & (labels != -100)[:, None]).any():
        with pytest.raises(DataError, match=r"labels must be -100 wherever an earlier row can read"):
            check_no_label_leak(labels, mask)
    else:
        check_no_label_leak(labels, mask)


def test_a_leak_is_named():
    labels = torch.tensor([[-100] * 5 + [7, 7, -100]])
    check_no_label_leak(labels, mma_mask(8, spans=[(0, 1, 3, 3, 5)]))
    with pytest.raises(DataError, match=r"label at token 5 of batch row 0, which row 1 attends"):
        check_no_label_leak(labels, mma_mask(8, spans=[(0, 1, 3, 3, 6)]))
    with pytest.raises(DataError, match=r"token 5 of batch row 0, which row 0"):
        check_no_label_leak(labels, MMAMask.full(8))


def test_named_constructors():
    n = torch.arange(6)
    distance = n[:, None] - n
    assert torch.equal(MMAMask.causal(6).dense()[0], distance >= 0)
    assert torch.equal(MMAMask.causal(2, 6).dense()[0], (distance >= 0)[4:])
    assert torch.equal(MMAMask.sliding_window(6, 2).dense()[0], (distance >= 0) & (distance < 2))
    assert MMAMask.full(3, 5, batch=2).dense().all()
    assert MMAMask.full(5, 3).dense().all()
    documents = MMAMask.documents(torch.tensor([0, 2, 2, 5]), 6, causal=False).dense()[0]
    assert torch.equal(documents, torch.block_diag(torch.ones(2, 2), torch.ones(3, 3), torch.zeros(1, 1)).bool())
    expanded = mma_mask(6, spans=[(0, 1, 3, 3, 5)]).expand(3)
    assert torch.equal(expanded.dense(), mma_mask(6, spans=[(0, 1, 3, 3, 5)]).dense().repeat(3, 1, 1))
    assert expanded.rects[:, 0].tolist() == [0, 1, 2]


def test_a_bidirectional_image_needs_no_rectangle():
    mask = mma_mask(8, spans=[(0, 2, 5, 2, 5)])
    assert mask.rects.shape[0] == 0
    expected = torch.ones(8, 8).tril().bool()
    expected[2:5, 2:5] = True
    assert torch.equal(mask.dense()[0], expected)


def test_flex_block_mask_equals_the_dense_mask():
    from torch.nn.attention.flex_attention import flex_attention

    spans = [(0, 20, 164, 164, 205), (1, 3, 100, 120, 130)]
    mask = mma_mask(230, spans=spans, batch=2, attention_mask=torch.ones(2, 230))
    block_mask = mask.block_mask(32)
    q, k, v = torch.randn(3, 2, 2, 230, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense()[:, None])
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=block_mask), expected)
    live, full = mask.tiles(32, 32)
    assert torch.equal(block_mask.to_dense()[:, 0].bool(), live)
    assert full.any()


def test_drawings(tmp_path):
    mask = mma_mask(6, spans=[(0, 1, 3, 3, 5)])
    assert mask.draw() == "#.....\n##.##.\n#####.\n####..\n#####.\n######"
    assert mask.draw(size=3) == "+++\n##+\n##+"
    path = tmp_path / "mask.png"
    mask.draw(str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ShapeError, match=r"row must be within the batch of 1; got 1"):
        mask.draw(row=1)


def test_a_mask_of_16384_tokens_is_built_at_once_and_is_small():
    spans = [(0, 100, 3000, 3000, 3064), (0, 5000, 9000, 9000, 9100)]
    mask = mma_mask(16384, spans=spans)
    times = []
    for _ in range(20):
        start = time.thread_time()
        mma_mask(16384, spans=spans)
        times.append(time.thread_time() - start)
    assert min(times) < 1e-3
    assert sum(t.numel() * t.element_size() for t in (mask.row_start, mask.row_end, mask.rects)) < 2**18


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mma_mask(6, spans=[(0, 1, 3, 4, 7)]), ShapeError, r"k1 <= klen; got"),
        (lambda: mma_mask(6, spans=[(0, 5, 7, 1, 6)]), ShapeError, r"inside the batch of 1 and the 6 positions"),
        (lambda: mma_mask(6, spans=[(1, 1, 3, 3, 5)]), ShapeError, r"inside the batch of 1"),
        (lambda: mma_mask(6, spans=[(0, 3, 3, 3, 5)]), ShapeError, r"q0 < q1"),
        (lambda: mma_mask(6, spans=[(0, 4, 6, 1, 3)]), ShapeError, r"keys precede its queries"),
        (lambda: mma_mask(6, spans=[(0, 4, 6, 1)]), ShapeError, r"5 columns"),
        (lambda: mma_mask(6, window=0), ConfigError, r"window must be at least 1"),
        (lambda: mma_mask(6, 4), ShapeError, r"klen must hold past_length \+ qlen"),
        (lambda: mma_mask(6, attention_mask=torch.ones(1, 5)), ShapeError, r"shape \(batch, klen=6\)"),
        (lambda: mma_mask(6, attention_mask=torch.ones(1, 1, 6, 6)), ShapeError, r"4-D mask cannot be combined"),
        (lambda: mma_mask(3, attention_mask=torch.tensor([[1, 0, 1]])), ShapeError, r"padding between tokens in row 0"),
        (lambda: mma_mask(6, batch=2, cu_seqlens=torch.tensor([0, 6])), ShapeError, r"with batch=1"),
        (lambda: mma_mask(6, cu_seqlens=torch.tensor([0.0, 6.0])), DtypeError, r"cu_seqlens must be int32 or int64"),
        (
            lambda: mma_mask(6, spans=[(0, 1, 2, 2, 5)], cu_seqlens=torch.tensor([0, 3, 6])),
            ShapeError,
            r"within one document",
        ),
        (lambda: mma_mask(3).expand(2).expand(2), ShapeError, r"must have batch 1"),
        (
            lambda: MMAMask(torch.zeros(1, 3), torch.zeros(1, 3), torch.zeros(0, 5), 3),
            DtypeError,
            r"row_start must be int32",
        ),
        (
            lambda: MMAMask(*torch.zeros(2, 1, 3).int(), torch.zeros(1, 4).int(), 3),
            ShapeError,
            r"shape \(nrects, 5\)",
        ),
        (
            lambda: MMAMask(torch.zeros(1, 3).int(), torch.zeros(1, 4).int(), torch.zeros(0, 5).int(), 3),
            ShapeError,
            r"\(batch, qlen\)",
        ),
        (
            lambda: build_mutual_spans(
                ids("tit"), prompt_end_token_id=TAG, mm_token_type_ids=torch.zeros(1, 4, dtype=torch.int64)
            ),
            ShapeError,
            r"mm_token_type_ids must have the shape \(batch, seqlen\) of input_ids, \(1, 3\); got \(1, 4\)",
        ),
        (lambda: build_mutual_spans(ids("tit")), ConfigError, r"got neither"),
        (
            lambda: build_mutual_spans(ids("tit"), image_token_id=IMAGE, mm_token_type_ids=ids("tit")),
            ConfigError,
            r"got both",
        ),
        (lambda: spans_of("tit", policy="prompts"), ConfigError, r"Did you mean 'prompt'"),
        (lambda: spans_of("tit", num_image_tokens=0), ConfigError, r"num_image_tokens must be 1"),
        (lambda: spans_of("tit", labels=torch.zeros(1, 3)), DtypeError, r"labels must be int32 or int64"),
        (lambda: spans_of("tit tit", cu_seqlens=torch.tensor([0, 3])), ShapeError, r"batch 1 when cu_seqlens"),
        (
            lambda: build_mutual_spans(mm_token_type_ids=ids("tit"), prompt_end_token_id=TAG),
            ConfigError,
            r"input_ids must be given",
        ),
        (
            lambda: check_no_label_leak(torch.zeros(1, 4, dtype=torch.int64), mma_mask(3)),
            ShapeError,
            r"labels must have shape \(batch=1, klen=3\)",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()

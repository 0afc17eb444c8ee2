# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Inside a paged-KV engine
#
# A language model writes one token at a time, and for each one it looks back at the keys and values of all tokens
# before it. Keeping these is what serving costs: they grow with every token, nobody knows how far, and many requests
# grow at once. **Paging** is the answer that operating systems found for memory: cut it into blocks of equal size
# and give each request a *table* of the blocks it owns. Nothing has to be contiguous, nothing is reserved in
# advance, and two requests may point at the same block.
#
# This notebook loads a small model that comes with the package, watches the blocks while it writes, and ends with a
# change of the attention itself in four lines. It needs no GPU and no download, and takes about a minute.

# %%
import time

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxpaged import AttentionVariant, Engine, SamplingParams
from jaxpaged.models import embedded_model_path

# %% [markdown]
# ## Load and generate
#
# An engine takes the folder of a Hugging Face checkpoint. The sizes below are tiny, to make the pictures readable:
# a pool of 64 blocks with 8 tokens each, at most 8 sequences and 16 tokens a step. Left out, the engine chooses them
# from the device's memory; and where nothing but decoding is to do, it may run several steps in one go, which
# `num_scheduler_steps=1` turns off: we want to look in after each.
#
# Every step is padded to one of a few *buckets*, shapes that have a compiled program. `warmup=True` compiles them
# now, so that nothing below waits for a compiler; `compilation_cache_dir=` would keep them for the next time.

# %%
engine = Engine(
    embedded_model_path(),
    num_blocks=64,
    block_size=8,
    max_num_seqs=8,
    max_num_batched_tokens=16,
    num_scheduler_steps=1,
    warmup=True,
)
print("buckets:", engine.config.buckets, "tokens")

# %%
prompts = ["import os\nimport sys\n\ndef main(", "class Queue:\n    def __init__(self, maxsize"]
params = SamplingParams(max_tokens=48, temperature=0.5, top_p=0.95, frequency_penalty=0.2, seed=3)
for output in engine.generate(prompts, params):
    print(output.prompt + output.outputs[0].text)
    print("-" * 60)

# %% [markdown]
# Both prompts ran in one batch. A result carries more than its text: token ids, log-probabilities if asked for, why
# it ended, and how long everything took.

# %%
completion = output.outputs[0]
print("tokens       ", completion.token_ids[:12], "...")
print("ended because", completion.finish_reason)
print("first token  ", f"{1e3 * (output.metrics.first_token_time - output.metrics.arrival_time):.0f} ms")

# %% [markdown]
# ## Stream
#
# `stream` yields an output for each step. By default it holds what is new; drop the iterator and the request is
# aborted.

# %%
for output in engine.stream(
    "def read_lines(path):\n", SamplingParams(max_tokens=40, temperature=0.3, seed=1)
):
    print(output.outputs[0].text, end="")

# %% [markdown]
# ## Look at the pool
#
# `generate` and `stream` are loops around three calls: `add_request`, `step` and `abort_request`. Calling `step`
# ourselves lets us stop in the middle and look around. `block_tables()` says which blocks each request has.


# %%
def draw_pool(engine, title, columns=16):
    """The pool as a picture: a square for each block, a colour for each sequence, a count where blocks are shared."""
    holders, names = {}, []
    for request, tables in engine.block_tables().items():
        for index, table in enumerate(tables):
            names.append(request if len(tables) == 1 else f"{request}, {index}")
            for block in table:
                holders.setdefault(block, []).append(names[-1])
    colour = {name: plt.cm.Set2(i % 8) for i, name in enumerate(names)}
    num_blocks = engine.stats().num_blocks + 1  # and block 0, where padding writes to
    rows = -(-num_blocks // columns)
    _, axes = plt.subplots(figsize=(8, 8 * rows / columns + 0.8), dpi=80)
    for block in range(num_blocks):
        x, y = block % columns, -(block // columns)
        owners = holders.get(block, [])
        face = "0.7" if block == 0 else "gold" if len(owners) > 1 else colour[owners[0]] if owners else "0.95"
        axes.add_patch(plt.Rectangle((x + 0.05, y + 0.05), 0.9, 0.9, facecolor=face))
        if len(owners) > 1:
            axes.text(x + 0.5, y + 0.5, f"x{len(owners)}", ha="center", va="center", weight="bold")
    for name in names:
        axes.plot([], [], "s", color=colour[name], markersize=10, label=name)
    if names:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4, frameon=False)
    axes.set(xlim=(0, columns), ylim=(1 - rows, 1), aspect="equal", title=title)
    axes.axis("off")
    plt.show()


# %%
long = SamplingParams(max_tokens=48, temperature=0.0, ignore_eos=True)
for name, prompt in {
    "parser": "import argparse\n\ndef parse(",
    "queue": "class Queue:\n    def ",
    "test": "def test_",
}.items():
    engine.add_request(name, prompt, long)
for _ in range(10):
    engine.step()
print(engine.block_tables())
draw_pool(engine, "after 10 steps")

# %% [markdown]
# Each request took a block when it needed one, so their blocks interleave. The grey square is block 0: padding has to
# write somewhere. Thirty steps later the tables have grown; when a request ends its blocks are free for the next.

# %%
for _ in range(30):
    engine.step()
draw_pool(engine, "after 40 steps")
while engine.has_unfinished_requests:
    engine.step()
print("blocks in use at the end:", engine.stats().num_blocks - engine.stats().num_free_blocks)

# %% [markdown]
# ## One prompt, four completions
#
# With `n=4` the prompt is computed once and its blocks are shared by all four, here golden and marked `x4`. The last
# block of the prompt is only half full, and each completion goes on in its own way: the first to write into a
# shared block gets a copy of it (*copy on write*).

# %%
document = '''"""Words and how often they occur."""


def count_words(text):
    """Return a dict of the words in text and their counts."""
    counts = {}
    for word in text.split():
        counts[word] = counts.get(word, 0) + 1
    return counts


'''
engine.reset_prefix_cache()
engine.add_request("n=4", document, long.clone(n=4, temperature=0.8, seed=0))
while not all(engine.block_tables()["n=4"]):
    engine.step()
for _ in range(16):
    engine.step()
draw_pool(engine, "one prompt, four completions")
tables = engine.block_tables()["n=4"]
print(
    "mapped:",
    sum(map(len, tables)),
    "blocks; in memory:",
    len({block for table in tables for block in table}),
)
engine.abort_request("n=4")
_ = engine.step()
# %% [markdown]
# ## The prefix cache
#
# A freed block keeps its content until somebody needs the room. Full blocks are found again by the tokens in them and
# before them, so a prompt that begins like an earlier one (a system message, a document, the turns of a
# conversation) starts where they part.

# %%
questions = ["def most_common(counts", "def main(", "def test_count_words("]
engine.reset_prefix_cache()
for question in questions:
    [output] = engine.generate(document + question, SamplingParams(max_tokens=8, temperature=0.0))
    took = output.metrics.first_token_time - output.metrics.arrival_time
    prompt = len(output.prompt_token_ids)
    print(
        f"{output.num_cached_tokens:3} of {prompt} prompt tokens were cached, first token after {1e3 * took:5.1f} ms"
    )

# %% [markdown]
# ## Throughput and the pool over time
#
# Requests do not come together. Here 24 of them arrive one by one while others run: each joins the batch at the
# next step, prompts are computed in pieces beside the tokens of those that write already (*continuous batching,
# chunked prefill*). `stats()` has the counters. Should the pool ever run full, the youngest request gives its blocks
# back and is computed again later (*preemption*): slower, but no token is lost.

# %%
random = np.random.default_rng(0)
arrivals = np.cumsum(random.exponential(4.0, size=24)).astype(int)  # in steps
lengths = random.integers(16, 80, size=24)
history, step, sent = [], 0, 0
while sent < len(arrivals) or engine.has_unfinished_requests:
    while sent < len(arrivals) and arrivals[sent] <= step:
        params = SamplingParams(max_tokens=int(lengths[sent]), temperature=0.7, ignore_eos=True)
        engine.add_request(f"arrival-{sent}", prompts[sent % 2], params)
        sent += 1
    begun = time.perf_counter()
    engine.step()
    stats = engine.stats()
    history.append((time.perf_counter() - begun, stats.num_generation_tokens, stats.num_requests_running,
                    stats.num_requests_waiting, stats.kv_cache_usage_perc))  # fmt: skip
    step += 1

# %%
seconds, tokens, running, waiting, usage = map(np.array, zip(*history, strict=True))
span = 10  # steps to smooth over
speed = np.diff(tokens, prepend=tokens[0]) / seconds
smooth = [np.median(speed[max(0, i - span) : i + 1]) for i in range(len(speed))]
_, axes = plt.subplots(3, 1, sharex=True, figsize=(8, 5), dpi=80, constrained_layout=True)
axes[0].plot(smooth, color="tab:blue")
axes[0].set(ylabel="tokens/s", ylim=(0, None), title="24 requests arrive one by one")
axes[1].stackplot(
    range(len(history)), running, waiting, labels=["running", "waiting"], colors=["tab:green", "0.8"]
)
axes[1].legend(loc="upper right", frameon=False)
axes[1].set(ylabel="requests")
axes[2].fill_between(range(len(history)), 100 * usage, color="tab:orange", alpha=0.6)
axes[2].set(ylabel="pool in use, %", xlabel="step", ylim=(0, 100))
plt.show()

# %%
stats = engine.stats()
print(f"padding        {100 * stats.padding_waste:.1f}% of the computed tokens")
print(f"preemptions    {stats.num_preemptions}")
print(f"programs       {stats.num_compiles}, compiled in {stats.compile_time:.1f} s")
print(f"host work      {1e6 * stats.host_time_per_step:.0f} µs a step")

# %% [markdown]
# The more requests run at the same time, the more tokens a second: a step reads all weights once, however many rows
# it has.
#
# ## Another attention in four lines
#
# What a token makes of those before it is a function you can write. `score_mod` gets the score of a query and a key
# and their positions, as scalars, and every attention kernel traces it into its inner loop, on the paged path too.
# Here is ALiBi (Press et al. 2022), which lets attention fade with distance:

# %%
slopes = jnp.exp2(-2.0 * (jnp.arange(engine.model_config.num_heads) + 1))
alibi = AttentionVariant(
    score_mod=lambda score, row, head, q_pos, kv_pos: score - slopes[head] * (q_pos - kv_pos)
)
window = AttentionVariant(sliding_window=8)
sizes = {
    "num_blocks": 64,
    "block_size": 8,
    "num_scheduler_steps": 1,
    "max_num_seqs": 1,
    "max_num_batched_tokens": 96,
}

# %% [markdown]
# The model was not trained with either, so what does it lose when it sees less? Ask for the log-probability it gives
# to each token of a text that it only reads.


# %%
def surprise(engine):
    """Nats a token of the document, given all before it."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    [output] = engine.generate(document, params)
    pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return np.array([-logprobs[token].logprob for token, logprobs in pairs])


found = {"as trained": surprise(engine)}
for name, variant in {"ALiBi": alibi, "window of 8 tokens": window}.items():
    with Engine(embedded_model_path(), variant=variant, **sizes) as other:
        found[name] = surprise(other)

# %%
plt.figure(figsize=(8, 3), dpi=80)
for name, nats in found.items():
    plt.plot(np.cumsum(nats), label=f"{name}: {nats.mean():.2f} nats a token")
plt.xlabel("token of the document")
plt.ylabel("nats so far")
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# A new idea is a new function: soft caps, sinks and masks by document or by tree work the same way (`mask_mod`,
# `logit_soft_cap`, `sinks`).
#
# ## Give the memory back
#
# `close()`, or a `with` block as above, frees the pool and the compiled programs.

# %%
engine.close()

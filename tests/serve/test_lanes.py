"""Texts that grow together come out in order and as early as that order allows."""

from collections.abc import Hashable

from hypothesis import given
from hypothesis import strategies as st

from jaxpaged.serve.lanes import Lanes


class Page:
    """What a Lanes has written."""

    def __init__(self, count: int) -> None:
        self.text = ""
        self.lanes = Lanes(range(count), self._write, begin=self._begin, end=self._end)

    def _write(self, text: str) -> None:
        self.text += text

    def _begin(self, key: Hashable) -> None:
        self.text += f"<{key}>"

    def _end(self, key: Hashable) -> None:
        self.text += f"</{key}>"


@given(st.data())
def test_any_interleaving_reads_the_same(data: st.DataObject) -> None:
    texts = data.draw(
        st.lists(st.lists(st.sampled_from(["a", "bc", ""]), max_size=4), min_size=1, max_size=4)
    )
    page = Page(len(texts))
    at, done = [0] * len(texts), [False] * len(texts)
    while not all(done):
        lane = data.draw(st.sampled_from([i for i, end in enumerate(done) if not end]))
        if at[lane] < len(texts[lane]):
            page.lanes.add(lane, texts[lane][at[lane]])
            at[lane] += 1
        else:
            page.lanes.finish(lane)
            done[lane] = True
        live = next((i for i, end in enumerate(done) if not end), None)
        if live is not None and at[live]:
            assert page.text.endswith(f"<{live}>" + "".join(texts[live][: at[live]]))
    assert page.text == "".join(f"<{i}>{''.join(pieces)}</{i}>" for i, pieces in enumerate(texts))


def test_the_first_text_is_live_and_the_next_one_follows_at_once() -> None:
    page = Page(2)
    page.lanes.add(1, "second")
    assert page.text == ""
    page.lanes.add(0, "first")
    assert page.text == "<0>first"
    page.lanes.finish(0)
    assert page.text == "<0>first</0><1>second"

"""Text that every Python installation carries: what the demo model is trained and fine-tuned on."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from stdlib_functions import standard_library_files

# Every 40th file is held out: about 2.5% of the text, from all parts of the library.
HELD_OUT_EVERY = 40


def standard_library_text() -> tuple[list[str], list[str]]:
    """Source texts of the standard library: (training documents, held-out documents)."""
    documents = [path.read_text(encoding="utf-8", errors="replace") for path in standard_library_files()]
    documents = [text for text in documents if text.strip()]
    train = [text for index, text in enumerate(documents) if index % HELD_OUT_EVERY]
    return train, documents[::HELD_OUT_EVERY]


def language_reference_text() -> tuple[list[str], list[str]]:
    """Topics of Python's language reference, English prose: (training documents, held-out documents).

    Every fourth topic, in alphabetical order, is held out. Long topics repeat paragraphs of short ones: of those only
    the first stays, and none that is held out stays in the training text.
    """
    from pydoc_data.topics import topics

    documents = [topics[name].split("\n\n") for name in sorted(topics)]
    held_out = documents[3::4]
    train = [paragraphs for index, paragraphs in enumerate(documents) if index % 4 != 3]
    seen: set[str] = set()
    held_out_texts = _without(seen, held_out)
    return _without(seen, train), held_out_texts


def _without(seen: set[str], documents: list[list[str]]) -> list[str]:
    """Documents without the paragraphs in `seen`, which is added to."""
    texts = []
    for paragraphs in documents:
        fresh = [text for text in dict.fromkeys(paragraphs) if text not in seen]
        seen.update(fresh)
        if any(text.strip() for text in fresh):
            texts.append("\n\n".join(fresh))
    return texts

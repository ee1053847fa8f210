"""What models read when they are compared and nobody names a text."""

DEFAULT_TEXT = (
    "The lighthouse keeper wrote down the weather every evening, and on most evenings there was nothing to "
    'say. "Wind from the west, 4 or 5," he wrote, "rain later; two ships, no lights." In 1893 that changed. '
    "A boat came in before dawn with seven people in it, none of whom spoke a language that he knew, and a "
    "dog. They stayed for eleven days. What they paid him with was a small machine of brass: it had a "
    "handle, twelve wheels and a row of windows in which numbers appeared. If you turned the handle once, "
    "the numbers became the next square: 1, 4, 9, 16, 25, 36. If you turned it backwards, they shrank. He "
    "never found out what else it could do.\n\n"
    "Later, when the lamp was electric and there was no keeper, a teacher from the village took the machine "
    "apart and drew every part of it on squared paper. She found 214 of them. Her drawings are in the "
    "library, and a student of hers wrote a program that follows them: for each turn it adds the second "
    "difference to the first, and the first to the sum. That is all. It is a good way to learn addition, she "
    "used to say, and a better way to learn patience; one of the wheels had been put in the wrong way round, "
    "and every seventh result was wrong by one. Nobody had noticed, because nobody had counted so far. The "
    "dog, by the way, stayed. It lived to be sixteen, which is a square, and was buried under the fig tree "
    "behind the house, where you can still read its name, although not the date, if the light is low enough "
    "and you know where to look. Most visitors do not; they come for the view, take a picture of the sea, "
    "and go home before the rain that somebody has written down for the evening.\n"
)
"""Prose with numbers and quotation marks: more than 256 tokens in any vocabulary."""

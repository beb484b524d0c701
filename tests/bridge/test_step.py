"""What pool_forward_step makes of a batch."""


def test_padding_is_told_by_the_loss(checks):
    # samples of 8 tokens and a label more, of which 6, 7, 8 and 9 are text; a filler; a loss left out in the middle
    assert checks["padding"] == [2, 1, 0, 0, 8, 0]
    # where the loss leaves out the ends of documents too, it tells nothing
    assert checks["padding without ends"] is None

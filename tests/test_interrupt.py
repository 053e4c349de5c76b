"""The first signal requests a stop, the second one stops at once."""

import signal

import pytest

from panollava.training.interrupt import SIGNALS, Interrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_second_signal_stops_at_once(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    interrupt = Interrupt()
    interrupt.listen()
    signal.raise_signal(number)
    assert interrupt.requested
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_the_previous_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    interrupt = Interrupt()
    interrupt.listen()
    interrupt.listen()  # in the validation of the start, and again when steps begin
    interrupt.restore()
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert not interrupt.requested

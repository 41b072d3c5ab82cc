"""Recurrent layers: the hidden units of all gates go together."""

from __future__ import annotations

from torch import Tensor

from secateur.graph.axes import Axes, Part
from secateur.graph.calls import Call
from secateur.graph.rules._registry import rule

_LSTM = 2  # the mode number of an LSTM in ATen


@rule("mkldnn_rnn_layer")
def lstm_layer(call: Call) -> None:
    """One layer and direction of an LSTM: weights (4H, I), (4H, H), biases (4H), states (..., H)."""
    ledger = call.ledger
    x, w_ih, w_hh = call.axes(call["input"]), call.axes(call["weight0"]), call.axes(call["weight1"])
    if call["mode"] != _LSTM:
        call.freeze()
        return
    steps = [(x, d) for d in range(len(x.shape) - 1)]
    call.macs = [[*steps, (w_ih, 0), (w_ih, 1)], [*steps, (w_hh, 0), (w_hh, 1)]]
    ledger.same(x, len(x.shape) - 1, w_ih, 1)
    gates = ledger.same(w_ih, 0, w_hh, 0)
    for bias in (call["weight2"], call["weight3"]):
        if isinstance(bias, Tensor) and bias.dim() == 1 and bias.shape[0] == w_ih.shape[0]:
            ledger.same(w_ih, 0, call.axes(bias), 0)
    gates = ledger.only(w_ih, 0)
    hidden = None if gates is None else ledger.equal_parts(gates, 4)
    states = [call.axes(call[name]) for name in ("hx_", "cx_")]
    for axes, dim in ((w_hh, 1), *((s, len(s.shape) - 1) for s in states)):
        labels = ledger.only(axes, dim)
        if labels is None or hidden is None:
            ledger.drop(axes, dim)
            if hidden is not None:
                ledger.freeze(hidden)
                hidden = None
        else:
            ledger.tie(labels, hidden)
    for out in call.outputs()[:3]:
        last = [] if hidden is None else [Part([out.dim() - 1], hidden)]
        call.put(out, Axes(out.shape, last))
    call.put_aside(call.outputs()[3:])

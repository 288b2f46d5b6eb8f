"""Low-rank adapters: trained beside a frozen base, and merged into it exactly.

LoRA (arXiv:2106.09685), rsLoRA (arXiv:2312.03732), DoRA (arXiv:2402.09353), and SkeMA, the sketched-matrix adapter of
this project: ΔW = S_outᵀ · M · S_in, with fixed random projections S_in and S_out and a trained k × k core M. Its
nearest published relatives are MoRA (arXiv:2405.12130) and LoRA-XS (arXiv:2405.17604).

Words: ΔW is the change of one matrix. A *delta* is ΔW in factored form, the adapter's leaves of one target (see
models/deltas.py). A *target* is a parameter whose matrices an adapter changes, in all or some of its layers.
Letters: I inputs, O outputs, R rank, K sketch width.
"""

"""Low-rank adapters: trained beside a frozen base, and merged into it exactly.

LoRA (arXiv:2106.09685), rsLoRA (arXiv:2312.03732), DoRA (arXiv:2402.09353), and SkeMA, the sketched-matrix adapter of
this project: ΔW = S_outᵀ · M · S_in, with fixed random projections S_in and S_out and a trained k × k core M. Its
nearest published relatives are MoRA (arXiv:2405.12130) and LoRA-XS (arXiv:2405.17604).

Terms: ΔW is the change of one matrix. A *target* is a parameter whose matrices an adapter changes, in all or some of
its layers. A *delta* is ΔW in factored form: the adapter's leaves for one target (see models/deltas.py).
Letters: I inputs, O outputs, K inner size of an adapter: rank of a LoRA, sketch width of a SkeMA.
"""

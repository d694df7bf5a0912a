"""The sums (moments) of each module's inputs, G = X^T X and its relatives, in as few forward passes as possible.

A fit of a linear layer needs nothing of its inputs X [tokens, d_in] but a few sums of size d_in x d_in (sums.py has
them and their law). To collect them, a block is run on all batches of the text, in the teacher (the fine-tuned model)
and in the student (the base with the components that are fitted so far). Two things make that hard:

    which input does a parameter meet?   Architectures differ, and code fuses, transposes and shares. So nobody is
                                         asked: one pass is run and its matrix products are watched     recorder.py
    when may a module be fitted?         The student's inputs of down_proj depend on how up_proj was fitted. Products
                                         that share an input form a stage; stages follow each other     stages.py

    recorder.py    Call: one product of an input with a parameter. Observer sees every product of a pass; Watch sees
                   those of given parameters, by hooks where a first pass has shown that hooks see them all
    stages.py      Stage: the parameters whose inputs are ready together, in the order of the forward pass
    passes.py      BlockPass: one batch on its way through one block, asked stage by stage for its inputs.
                   CachedPass (teacher) keeps all inputs of one run; SuspendedPass (student) stands still in a thread
                   until the stage is fitted; ReplayedPass runs anew for each question and needs no memory
    sums.py        Moments: G, E, F of some tokens, the same bits in whatever order batches are added. Statistics: those
                   of the fit and of its validation. Validation: the error of any delta, from the sums alone
    collector.py   MomentsCollector: both sides of one block. For each stage in turn: collect its sums, let the caller
                   fit and install it, go on; then hand over the outputs, which are the next block's inputs
    spill.py       SpilledTensors: hidden states by batch, in memory up to a limit, beyond it in files

One stage of a Llama block, for one batch:

    student pass  -> q_proj's input reached -> stands still    \
    teacher pass  -> its input of q_proj, from the cache        >  Moments.add  -> fit q, k, v -> weights written
    student goes on with the fitted weights -> o_proj's input reached -> stands still ...
"""

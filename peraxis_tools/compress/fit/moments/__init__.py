"""The sums (moments) of each module's inputs, G = X^T X, E and F, in as few forward passes as possible.

A fit of a linear layer needs only a few sums of size d_in x d_in over its inputs X [tokens, d_in] (see sums.py). To
collect them, a block is run on all batches of the text, in the teacher (the fine-tuned model) and in the student (the
base with the components that are fitted so far). Two problems have to be solved:

    Which input does a parameter read?   Architectures differ, and code fuses, transposes and shares parameters. So one
                                         pass is run and its matrix products are recorded              recorder.py
    When can a module be fitted?         The student's inputs of down_proj depend on the fit of up_proj. Products that
                                         share an input form a stage; stages are fitted in order       stages.py

    recorder.py    Call: one product of an input with a parameter. Observer reports every product of a pass. Watch
                   reports those of given parameters; it uses hooks if a first pass shows that hooks see all calls
    stages.py      Stage: the parameters whose inputs are ready together, in the order of the forward pass
    passes.py      BlockPass: one batch in one block; it gives its inputs stage by stage.
                   CachedPass (teacher) caches all inputs of one run; SuspendedPass (student) waits in a thread until
                   the stage is fitted; ReplayedPass runs again for each stage and needs no memory
    sums.py        Moments: G, E, F of some tokens, with the same bits for each order of the batches. Statistics: the
                   moments of the fit and of its validation. Validation: the error of any delta, from moments alone
    collector.py   MomentsCollector: both sides of one block. For each stage in turn it collects the moments and lets
                   the caller fit and install the modules; then it gives the outputs, the next block's inputs
    spill.py       SpilledTensors: hidden states by batch, in memory up to a limit, in files beyond it

One stage of a Llama block, for one batch:

    student pass  -> q_proj's input reached -> waits           \
    teacher pass  -> its input of q_proj, from the cache        >  Moments.add  -> fit q, k, v -> weights written
    student continues with the fitted weights -> o_proj's input reached -> waits ...
"""

"""OPO: on-policy reinforcement learning of language models with the optimal baseline.

Start with `loop.py`, the training loop on the host; `learner/update.py` is the update
on the device, and `advantages.py` holds the paper's estimator. `docs/glossary.md`
defines every name.

    __main__    the commands: train, eval, report, export
    config      every knob on one page
    loop        prompts -> rollouts -> rewards -> update -> record
    run         the phases of a step, and what stays the same throughout
    reward_training preference pairs -> a reward model
    commands    evaluate, export, ask, measure: a run that is there already
    build       Config -> policy, optimiser, sampler, update
    advantages  rewards, lengths, groups -> advantages
    losses      log-probs, advantages, mask -> scalar
    logprobs    hidden states x unembedding -> log-prob, entropy, energy
    rollouts    the one type that crosses rooms
    trainer     the jitted on-policy update
    packing     which tokens it computes, and in which rows
    sampler     prefill once per prompt, decode with a cache
    sharding    mesh, logical axes, host <-> global arrays
    checkpoint  Orbax: everything a run needs to go on, together
    evaluation  pass@k, maj@k, mean@n with intervals; a file of responses
    diversity   texts -> Self-BLEU, distinct-n, repetition
    judging     mean scores, and win rates over the start policy
    metrics     JSON lines, TensorBoard, progress, run.json
    plots       run directory -> figures
    report      run directory -> report.html, with the figures inside
    compare     several runs -> paired differences, compare.html
    models      one decoder for the families, Hugging Face format in and out
    data        prompts, sources, preference pairs, two embedded tasks
    rewards     math verification in processes with a time limit, reward models

Arrays inside models, sampler and learner end in their shape (`hidden_BTD`). One letter
has one meaning:

    B  rows of a batch          N  rollouts of a step
    T  tokens of a row; response tokens of a rollout
    S  key positions attended to
    P  prompt tokens            G  prompts, each with a group of rollouts
    D  model width              F  MLP width              V  vocabulary
    H  query heads              K  key-value heads        R  query heads per K
    E  width of one head        L  layers

The update's plan packs responses: there R counts rows, W their columns, C the columns
that hold responses, and E the prompts, each of which some rows share.

This module imports nothing, so `import opo_jax.losses` costs no more than JAX.
"""

__version__ = "0.1.0"

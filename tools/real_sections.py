"""Sections of the page about real models: of each the heading, and what its numbers are."""

from __future__ import annotations

#: section of the results → heading, and what its numbers are
SECTIONS = {
    "behaviours": (
        "What they can do",
        "Shares of prompts with 95 % Wilson intervals. *top-1*: the answer is the likeliest next token; *pair*: it "
        "beats the foil; *flip*: after the corrupt prompt the foil beats the answer; *Δ*: mean of logit(answer) − "
        "logit(foil), of greater-than the difference of probabilities, with Student's interval. Labels that mean "
        "nothing (foo and bar) are a case that must fail: chance is 0.5.",
    ),
    "induction": ("Repeated random tokens", "The share of tokens foreseen in sequences of random tokens said twice."),
    "heads, one at a time": (
        "Heads, one at a time",
        "Activation patching (denoise) of `z`, in logits: the head's clean value in the corrupt run. *recovered* is "
        "the share of clean − corrupt. In brackets after “chance”: random steps of the same length at the same head; "
        "of all others, the range of their effects.",
    ),
    "neurons": (
        "Neurons",
        "Capitals. *right city over others*: what the 10 largest updates of each layer from 20 on add to the logit "
        "of the right city, minus that of the other cities, in logits (chance: the city of another prompt); the "
        "neurons are chosen without the answer. *score*, in nats: importance minus importance in the corrupt "
        "prompt (chance: other neurons of the layer). *masked p* and *kept p*: probability of the city with the "
        "first neurons set to zero at the last token, or with all others set to zero (chance: as many random ones "
        "of each layer). Neurons are chosen on one half of the prompts and measured on the other; *untouched* is "
        "without an edit.",
    ),
    "token-frequency neurons": (
        "Neurons along the frequency of tokens",
        "Passages in pieces of 24 tokens; the three neurons of layers 20 to 29 that move logits farthest along the log "
        "unigram distribution (the mean of the model's predictions on the other half of the pieces). *cosine*: of the "
        "logits that the neuron's value writes with that distribution (chance: random mixes of the layer's other "
        "values). *KL to unigram* and *entropy*: their change in nats when the neuron is held at its mean (chance: the "
        "same activation taken out along such mixes, of the same norm). *Through*: the part of it that is gone when "
        "the final norm's scale, or the logits' component along the distribution, is kept as without the edit. *Hardly "
        "read*: of the longest tenth of values in the last three layers, those with the least variance of logits over "
        "tokens, the sign of entropy neurons; no such neuron acts through the scale here.",
    ),
    "tokens of neurons, from weights": (
        "Tokens of neurons, from weights",
        "The 8 neurons of a layer with the largest updates on 16 prompts about capitals (the number of prompts is "
        "theirs, intervals are over them). How far their ten furthest tokens stand out of the vocabulary, in standard "
        "deviations: those that the value promotes and suppresses, and those that its two keys read; chance: random "
        "mixes of the layer's values or keys. Values hardly stand out; keys do, in the first and the last layer.",
    ),
    "what neurons write, from weights": (
        "What neurons write, from weights",
        "Means over all neurons of a layer (the number of prompts is theirs). *logit variance*, in thousandths: of "
        "the cosines of a value with tokens' rows; *null space*: the share of a value's length in the "
        "hundredth of directions that the unembedding reads least; chance: random mixes of the values. *kurtosis* of "
        "its entries; chance: the same values in a rotated stream. The basis of the stream is a privileged one.",
    ),
    "triggers of neurons": (
        "Triggers of neurons",
        "Passages in pieces of 48 tokens; the same 8 neurons of a layer by their updates (intervals are over neurons). "
        "*Same token again*: the share of the ten held-out contexts in which a neuron fires most that end in a token "
        "in which one of the ten chosen ones ends; *promotes what follows*: of all twenty, those whose next token is "
        "among the ten that the value promotes. Chance: as many tokens of the text. No interval lies "
        "beyond chance, and no value promotes what follows.",
    ),
    "chains of tokens, from weights": (
        "Chains of tokens, from weights",
        "Of 512 tokens, the 48 whose best key stands out most: which token attends to which, and writes what, both "
        "circuits read with bare embeddings (the number of prompts is that of chains). Shares of chains in which the "
        "head raises most the token that it attends to, or attends most to the same token; chance: that of other "
        "chains. A negative finding: heads of layers 16 to 23 do neither, for they read what earlier layers made.",
    ),
    "the answer along depth": (
        "The answer along depth",
        "Capitals; logit(answer) − logit(foil) of the stream after a block, at the last token, with the final norm's "
        "scale of the end (`lenses.accumulated_residual`), in logits; chance: random pairs of tokens. It comes within "
        "layer 23, and layer 29 adds a fifth.",
    ),
    "where heads bring the answer from": (
        "Where heads bring the answer from",
        "The share of logit(answer) − logit(foil) that a head brings from a position, counted from the end, in logits "
        "(`lenses.source_attribution`); chance: toward random pairs of tokens; *head*: from all positions. Of each "
        "task the five heads with the largest share, each with its largest position. Capitals come from the country "
        "(-2 or -3, by the wording), by way of head 23.4; two heads of layer 29 work against each other.",
    ),
    "composition of memories": (
        "What MLPs compose",
        "The last tokens of beginnings of the passages; shares of prompts. *within: no memory*: the token that the "
        "MLP's output promotes most is that of none of its ten strongest memories (chance: the same memories with "
        "random signs). Between layers, the likeliest token behind the MLP is that of the stream before it "
        "(*residual*), of the MLP's output (*mlp*), or of neither (*composition*) (chance: random mixes of the layer's "
        "values in the place of the output, of its norm).",
    ),
    "polysemanticity": (
        "At how many things neurons fire",
        "Passages in pieces of 48 tokens; the 8 neurons of a layer with the largest updates (the number of prompts is "
        "theirs). The effective number of different contexts among the 12 in which a neuron fires most, on one half of "
        "the pieces and on the other, mean over neurons: by what the MLP reads (*contexts*), and by the token alone "
        "(chance: random directions of the layer's activations).",
    ),
    "arithmetic": (
        "Sums",
        "Sums of single digits with a result of one digit. *top-1* behind four solved ones, and of word problems "
        "without any. Behind four solved ones: *probability*, its change without the head of layers 22 to 29 whose "
        "removal cost most on the other half (chance: steps as long as the removal's in random directions, at six "
        "heads); *masked* and *kept*: the answer's probability with the first neurons that two such heads trigger set "
        "to zero at the last token, or all others of these layers (chance: as many random ones of each layer).",
    ),
    "arithmetic, of all heads": (
        "Sums, of all heads",
        "`python -m tools.real_arithmetic`, 20 minutes of one core: each of the 270 heads is set to zero in problems "
        "of each operation, behind four solved ones. Every second problem chooses the three key heads whose removal "
        "costs most; the rows are of the others: the answer's *probability* and *top-1* untouched, and the *change* "
        "of the probability in the problems of an operation without one key head of another, or all three (chance: "
        "one other head of the layer; random sets, as many of each layer). *Probability* without the first 10 of the "
        "neurons that the key heads trigger, set to zero at the last token (chance: as many random ones of each "
        "layer). Head 14.2 is a key head of all four operations. The key heads of sums cost differences and quotients "
        "beyond chance, too, but not products; those of products and quotients are the same three, and cost sums and "
        "differences as much as themselves. The first ten neurons are needed beyond chance for sums and quotients. It "
        "can hardly do quotients and differences.",
    ),
    "reading by lenses": (
        "Lenses with interventions",
        "*debug*: wrong facts (the answer is not the likeliest token); *margin*: logit(expected) − logit(actual), "
        "*without it*: what it gains at the last token without the component found (chance: random components of "
        "its kind); *confirmed*: the share of them whose answer comes back, above all of chance. *deletion*: "
        "logit(answer) − logit(foil) left, mean over the curve, when tokens are removed in an order (chance: "
        "random orders); *below random*: how far it lies below their mean. *residual*: what AttnLRP's relevances "
        "miss of what they explain. *patchscope*: probability of the capital behind `Japan: Tokyo; Italy: Rome; "
        "Egypt: Cairo; x:` with the state of a country's last token in place of `x` (chance: random states of the "
        "same length); from the embedding, the target prompt does all the work itself.",
    ),
    "where heads look": (
        "Where heads look",
        "Attention from the last token to the subject (chance: the other heads of the layer), and, in random tokens "
        "said twice, to what followed the token before (chance: the token beside it).",
    ),
    "heads together": (
        "Heads together",
        "The set takes corrupt values in the clean run, in logits; chance: twenty random sets, as many of each layer "
        "where enough are left. Of random tokens: the share foreseen while the heads are zero; chance: ten such sets.",
    ),
    "what heads write": (
        "What heads write",
        "Direct attribution toward answer over foil, in logits; chance: toward random pairs of tokens.",
    ),
    "composition of heads, from weights": (
        "Composition of heads, from weights",
        "Heads are named by their attention on random tokens said twice; *z* is read from the weights: K-composition, "
        "in standard deviations of a random rotation of the residual stream. Chance: rotations drawn; of the mean of "
        "previous-token → induction pairs, 95 % of pairs that cannot compose, the receiver being the earlier one; of "
        "the share of such pairs among the first ten, a pair drawn at random. *score*: the raw Frobenius ratio. Three "
        "heads share their keys, so that 18.8 stands beside 18.6 and 18.7 whatever it does.",
    ),
    "how far back heads look, from weights": (
        "How far back heads look, from weights",
        "Queries and keys of a head put together at every distance: those that it makes of streams of four texts of "
        "random tokens, wherever they stood, or of bare embeddings. *score* of keys one token back, less the mean over "
        "eleven distances of 0 to 32; *share* of the variance of scores that the distance explains; *best*: the "
        "distance scored highest. Chance: keys whose mean points in a random direction. All four previous-token heads "
        "are positional, and look one back, in streams; of bare embeddings only 11.1 scores one back highest.",
    ),
    "spectra of heads, from weights": (
        "Spectra of heads, from weights",
        "Singular values of circuits; chance: the head's own two matrices with a random rotation between them. "
        "*strength*: how far the first token along a direction stands out of the vocabulary, in standard deviations; "
        "chance: random directions that the head writes. *rank*: how many equal singular values would be as even. "
        "Of what the head of capitals writes, the first direction is of lands and peoples. Queries of previous-token "
        "heads are laid to their keys less than chance would have it, at neither distance more.",
    ),
    "virtual weights of heads, from weights": (
        "Virtual weights of heads, from weights",
        "What a head writes, W_O, against what the keys of four induction heads read (they share two key heads), in "
        "standard deviations of a random rotation of the residual stream. Chance: rotations drawn; of the mean, 95 % "
        "of pairs whose reader comes first. 16.0 and 17.8 are previous-token heads.",
    ),
    "what heads copy, from weights": (
        "What heads copy, from weights",
        "256 tokens through the OV circuit: how far each token's own logit stands out of all, in standard deviations; "
        "chance: another token's. *copying*: Σλ / Σ|λ| over the circuit's eigenvalues; chance: the values of other "
        "heads. Some previous-token heads copy as much, so this does not tell the two kinds apart.",
    ),
    "attention over long texts": (
        "Attention over long texts",
        "The first 2,048 tokens of three modules of PyTorch (rnn, transformer, lr_scheduler), 128 random "
        "queries each, streamed. The three heads that look most at each kind of keys, and farthest back; chance: a "
        "random key, or the keys of another query's token; of distance: uniform attention. *first*: the same head's "
        "attention to the first token: the heads that look farthest back look at it.",
    ),
    "types of heads": (
        "Types of heads",
        "Random tokens said twice: the share of a head's attention at the keys of a type, for up to five heads claimed "
        "of each (of how many). Chance: its keys shuffled. *raises*: the direct effect of its output on the tokens at "
        "these keys, in standard deviations over the vocabulary; *weighted*: attention times the norm of the values. "
        "Heads of layer 17 match prefixes, but hardly raise what they look at; 23.2 does, though its eigenvalues say "
        "no. No head is of the types anti-induction and delimiter.",
    ),
    "types of heads, removed": (
        "Types of heads, removed",
        "The heads claimed above put at their mean together: the rise of the loss in nats at tokens that go on with "
        "what was said before, and elsewhere. Random tokens are others than those that chose the heads; the text is "
        "eight passages written for this. *foreseen*: the share of such tokens that stays likeliest. Chance: four "
        "random sets, as many heads of each layer. *Every second text*: up to five heads that look most at the token "
        "itself, the first one, punctuation or a window (without previous-token heads), chosen on the other texts, "
        "with three random sets. None of these is beyond what random sets do but heads of the current token, "
        "elsewhere, by an interval that touches them.",
    ),
    "pages of single heads": (
        "Pages of single heads",
        "Heads found in random tokens, on eight passages: the share of queries whose most attended key is the one "
        "foreseen, among the weakest, the middle and the hardest tenth of their looks (chance: random keys), and the "
        "attention of these looks. *copies*: how far a head raises the token that it attends to, in standard "
        "deviations over the vocabulary (chance: the tokens of other sources), with the values that it reads in the "
        "text, and with those of bare embeddings. *removed*: the rise of the loss, in nats, at tokens that were said "
        "before and at all others, without the head (chance: other heads of its layer); only that of 16.0 is beyond "
        "what these do. 23.4 reads capitals: of the countries in the prompts, the tokens attended to and written that "
        "go together most, and what values turned at random in its space reach.",
    ),
    "heads that move names": (
        "Heads that move names",
        "Indirect object identification. *attention*: from the last token to the name that is the answer (movers), to "
        "the other name (suppressor), to its second mention (inhibition); chance: the mean of all other positions. "
        "*direct*: what the head writes toward the answer, in logits; chance: toward random pairs of tokens. Heads are "
        "chosen by these two; on other prompts they take corrupt values together, in logits; chance: ten random sets, "
        "as many of each layer. The largest direct effect is that of 23.3, which looks at the other name and writes "
        "against it. The movers alone do no more than random sets do, which may hold 23.3.",
    ),
    "roles of heads on a task": (
        "Roles of heads on a task",
        "Indirect object identification, one call of `heads.roles`; up to three heads of each role (of how many). "
        "*attention*: from the role's query to its keys; chance: other tokens of the prompt. *direct*: the head's "
        "share of logit(answer) − logit(foil); chance: random pairs of tokens. *logits*: the change of that difference "
        "when all heads of the role are put at their mean; *looks*: the change of the name mover's attention to the "
        "answer over the foil; chance: four random sets, as many heads of each layer. The name mover can be removed "
        "without loss: the negative mover 24.4 then lowers the answer by 0.4 less. No backup name mover is found.",
    ),
    "copy suppression": (
        "Copy suppression",
        "`heads.copy_suppression` on passages in pieces of 32 tokens: *suppresses* is the share of a head's effect "
        "that comes back when only what it writes against the tokens that it attends to is kept, *copies* what it "
        "writes for them (chance: the directions of other tokens); *effect*: KL divergence, in nats, with the head at "
        "its mean. *Keys predicted most*: the twentieth of a query's keys whose tokens have the largest logits in "
        "front of the head, at least one. 23.3 and 24.4 lower the names of sentences, 17.3 is an induction head. Both "
        "former write against what they look at, yet not against what was predicted: copy suppression is not found. "
        "The rows of all keys were added after those of the keys predicted most had given nothing.",
    ),
    "successor heads": (
        "Successor heads",
        "The share of 82 words (days, months, numbers, number words, ordinals, letters) that a head's output circuit "
        "turns into the next of their order, read from weights (`heads.successor`); the three largest of 270; chance: "
        "the order shuffled. None is claimed.",
    ),
    "retrieval heads": (
        "Retrieval heads",
        "Needles in 64 tokens of the passages, `heads.retrieval`: 8 random tokens, whose first two the end of the "
        "prompt says again, and sentences (“The favorite city of the doctor is Cairo.”) with a question behind the "
        "text. *score*: the share of the answer's tokens that the model foresees and the head looks hardest at in the "
        "needle; *attended*: whatever it foresees (chance: another token of the needle); of *answered*, the range over "
        "five depths; of the claimed heads, the share that matches prefixes or is an induction head on random tokens "
        "said twice (chance: those exchanged within their layers; the number of prompts is that of the heads). "
        "*loss*, in nats: its rise at the answer and at the text around without the first heads at once (chance: "
        "random sets, as many of each layer), on the half of the prompts that did not choose them.",
    ),
    "function vectors": (
        "Function vectors",
        "`heads.function_vectors` on capitals, plurals, past forms and antonyms, in the form `Q: hot⏎A: cold`, five "
        "examples. *probability*: the change of the right answer's probability in prompts with shuffled labels, with a "
        "head's mean over prompts that show the task at the last token; of random steps of the same length, the range "
        "over 64 heads. *shown*, *labels shuffled*, *zero-shot*: the share of words held out whose answer is the "
        "likeliest token. *3 × at 15*, *1 ×*, *3 ×*: what that share gains without examples when the sum of what the "
        "ten best heads write on average is added at the last token behind a layer, once or three times (chance: the "
        "vectors of ten other heads, as many of each layer, of the same norm). Of the heads removed, the change of the "
        "share with examples (chance: random sets). Capitals are named as often with shuffled labels, and no vector "
        "brings them.",
    ),
    "answers of several tokens, and chats": (
        "Answers of several tokens, and chats",
        "log P(answer) − log P(foil) in nats, over all tokens of both; *top-1*: every token is the likeliest. Effects: "
        "activation patching (denoise) of the heads of two layers. In chats the user asks for a capital and the reply "
        "has begun (“The capital of France is”); effects are in logits.",
    ),
    "lenses: swapping two tokens": (
        "Lenses: swapping two tokens",
        "Answer and foil of prompts about capitals are swapped in the stream of the last position, at one depth at a "
        "time (depth 0 is the embedding, 24 the stream after layer 23), along the directions of a lens. "
        "*success*: the share of prompts in which the other of the two becomes the likelier; *effect* on logit(answer) "
        "− logit(foil); *length* of the change as a share of the stream's; chance: two random changes of that length. "
        "Jacobian directions are exact rows, averaged over four contexts of 64 tokens of the standard library's "
        "docstrings.",
    ),
    "subspaces that carry a variable": (
        "Subspaces that carry a variable",
        "Distributed alignment search (`directions.das`) at the end of layer 27, last position: pairs of a male and a "
        "female name in both orders, trained on one template and measured on the other. *IIA*: the share of pairs "
        "whose top prediction becomes the label when the line is exchanged, here at most that of the whole vector; "
        "*label beats foil* is half by chance. Chance: random lines. The line through the class means does as well. "
        "In a model with shuffled weights no top prediction becomes the label.",
    ),
    "probes on latents and without them": (
        "Probes on latents and without them",
        "AUROC on held-out groups (`dictionaries.quiver`), layer 15, mean over tokens; a TopK dictionary of 1024 "
        "latents trained on 16,000 tokens. *gain*: of the probe that validation chooses with latents to choose from, "
        "less the one without; *lost*: of the logistic probe on what it rebuilds. Chance: shuffled labels.",
    ),
    "probes of all layers": (
        "Probes of all layers",
        "Linear probes of sentiment and register (formal or not), tested on templates and acts of speech with words of "
        "their own; intervals over these groups; chance: shuffled labels. *selectivity*: accuracy less that on labels "
        "drawn per word; *words alone*: the same probe on counts of tokens. The best place is chosen among all.",
    ),
    "steering by strength": (
        "Steering by strength",
        "The direction of sentiment (difference of means over tokens, layer 13) is added at all positions of reviews: "
        "*effect* on logit(positive) − logit(negative), and the perplexity of neutral text as a multiple of the plain "
        "one; chance: random directions of the same length. *anti-steerable*: the share of prompts that go the wrong "
        "way. Layer and strengths had been tried before, on other prompts. No slope is shown: its interval holds 0.",
    ),
    "steered text": (
        "Steered text",
        "Ten openings, fixed before they were measured (layer and strength had been tried on others), continued "
        "greedily with the direction of formal register (layer 13) at −1 and "
        "+1, its natural length; *loss*: of the continuation under the unsteered model, in nats per token; "
        "*component*: of the continuation along the direction; chance: two random directions of the same length. An "
        "instruction is a formal sentence in front.",
    ),
    "steered text, ten examples": (
        "Steered text, ten examples",
        "All ten openings of the table above, none left out; −1 is informal and +1 formal; loss of each continuation "
        "under the unsteered model, in nats per token.",
    ),
    "directions found": (
        "Directions found",
        "AUROC of texts of held-out groups along a direction of the mean over tokens, the best of layers 5, 11, 17 and "
        "23; chance: found with shuffled labels (far below ½ is chance, too); *cosine*: with the difference of means.",
    ),
    "refusal: the direction": (
        "Refusal: the direction",
        "Of three layers at the last position of the chat template, the candidate selected as published (if none "
        "passes, the one that induces most): log p − log(1 − p) of “I” and “Sorry” as first tokens. *bypass*: harmful "
        "requests with the direction ablated; *induce*: benign ones with it added; *KL*, in nats: benign ones under "
        "ablation; chance: a random direction. The number of prompts is that of each class.",
    ),
    "refusal: interventions": (
        "Refusal: how often",
        "Shares of held-out requests, on subjects that the direction was not found on, whose first 8 tokens in the "
        "chat template have words of a refusal (“I'm sorry”, “I cannot” …), without edits and with the direction "
        "added; *kept*, *KL*, *perplexity*: what that costs on benign requests; chance: a random direction of the same "
        "length. The requests were fixed before anything was measured; layers, forms "
        "and length were cut for time. The model hardly refuses: it apologises, by the "
        "wording (“Help me to …”), for harmful requests and for their benign matches alike.",
    ),
    "concepts in the unembedding": (
        "Concepts in the unembedding",
        "Pairs of words that differ in one thing: the cosine of each pair's difference of unembedding rows with the "
        "direction of all other pairs (leave-one-out) in the causal inner product, interval over pairs; *plain*: in "
        "the coordinates as stored; chance: as many random pairs of tokens. What is called prompts are pairs.",
    ),
    "cosines between concepts": (
        "Cosines between concepts",
        "Of pairs of these concepts that share no words: mean and largest |cosine| of their directions; chance: "
        "directions of random pairs of tokens. What is called prompts are pairs of concepts.",
    ),
    "directions of the vocabulary": (
        "Directions of the vocabulary",
        "Rows of the unembedding, 256 of them looked at one by one: the largest |cosine| with another row, the root "
        "mean square with all, the least that so many can have (Welch), and the sum of their dimensionalities over "
        "all; chance: random directions of the same lengths. What is called prompts are rows.",
    ),
    "features of a prompt": (
        "Features of a prompt",
        "“Mary went to the garden and saw three”, with number (1 to 12), name and place known: the battery of "
        "properties at the last token, the worst feature each. *verdict*: 1 yes, 0 no, none where the order forbids "
        "to ask. Numbers are decomposable, but no magnitudes along a line: 0.65 of what they explain is curved.",
    ),
    "two models on the same text": (
        "Two models on the same text",
        "SmolLM2 beside another model, a word a row. *cka*: debiased linear CKA, interval over groups of paragraphs; "
        "*svcca*: mean canonical correlation of ten components; *matched*: mean over dimensions of the largest "
        "|correlation| with a dimension of the other. Chance: shuffled words; of *matched*, the other in random bases. "
        "Gemma is beyond shuffled words, yet not surely nearer than the same model with shuffled weights: in "
        "block 0 that is nearer, and behind it the intervals meet on this text (docstrings; on another they did not).",
    ),
    "claims of explain": (
        "What explain claims at both efforts",
        "`cutaway explain` of one capital and one IOI sentence at its default effort, where first-order estimates "
        "choose what is measured, and at `--effort thorough`, which measures every cell. *claimed*: claims that "
        "interval and control support, *of* so many; they are the same ones (the depth is not claimed: in the logit "
        "lens the answer leads at the end alone). *heads*: exchanged together in other sentences; *recovered*: what "
        "that takes away of the difference (chance: random sets of as many heads).",
    ),
    "checks": (
        "Self-check",
        "How many identities were checked and failed at the first load, how many sites were disabled, and CPU seconds "
        "on the machine named (told, not tested).",
    ),
}

"""What `tessella --help` and each command's own --help say; the first line of each stands in the list of commands."""

ABOUT = """InternVL2 from tiles to tokens to an answer: ask, teach, convert, compare, ask again.

examples:
  tessella demo                                      the whole story on the built-in model, on this machine's CPU
  tessella chat --image dish.jpg "What is it?"       one answer
  tessella chat ./InternVL2-2B                       a conversation
  tessella finetune --data photos/ --output runs/f   a folder of folders: class names become the answers
  tessella convert runs/f ./mine --to official       merged, written, proved
  tessella evaluate tessella-nano ./mine --data photos/ --html report.html

tessella COMMAND --help tells the rest. A MODEL is a folder in the official InternVL2 layout, an adapter folder that finetune
wrote, a name on a hub (OpenGVLab/InternVL2-2B, with @REVISION if wanted; modelscope:OpenGVLab/InternVL2-2B), or
tessella-nano, the built-in model (its parts are fetched once, on first use)."""

CHAT = """Ask about pictures, or just talk.

examples:
  tessella chat --image dish.jpg "What is it?"       prints the answer alone; so does a question on standard input
  tessella chat --image a.jpg --image b.jpg "What differs?"
  tessella chat runs/food                            a conversation with an adapter on its base; /help lists the commands
  tessella chat --temperature 0.7 --seed 1 "Tell me a story."     the same seed, the same story"""

FINETUNE = """Teach a model: LoRA on the language model, the projector trained or frozen, the tower if wanted, or everything.

examples:
  tessella finetune --data photos/ --output runs/photos          photos/CLASS/*.jpg
  tessella finetune recipes/grocery.toml --data grocery/         a recipe, with one thing changed
  tessella finetune recipes/grocery.toml --resume                go on after Ctrl-C or a crash
  tessella finetune recipes/grocery.toml --nproc 8 --parallel fsdp2     eight GPUs; recipes/launch/ has several machines
  tessella finetune --model ./InternVL2-2B --data sivqa_llava.json --output runs/food

Look at the data first: tessella inspect sivqa_llava.json --model ./InternVL2-2B
The flags below stand in four groups: data, learning, running, decoders. --data and --output are all that is needed."""

CONVERT = """Any layout into any other, and the proof that nothing changed.

What IN is, is recognised:
  official layout     InternVL2's own, which InternVL's code, LMDeploy and vLLM open
  native layout       that of transformers' own InternVL, without remote code
  adapter             PEFT's files, as finetune writes them; it may lie on another adapter
  LoRA checkpoint     of the official training code (use_llm_lora, use_backbone_lora)
  XTuner's .pth       a file, or DeepSpeed's folder of that name; opened without running code

examples:
  tessella convert runs/food ./InternVL2-2B-food --to official        merged into the base that it names
  tessella convert runs/food ./out --base ./InternVL2-2B              the base has moved since
  tessella convert ./InternVL2-2B ./InternVL2-2B-hf --to native       and back: --to official, bit for bit
  tessella convert runs/food ./food-hf --to adapter --names native    the adapter alone, for PEFT on transformers' class
  tessella convert iter_640.pth ./merged --base ./InternVL2-2B --xtuner-config internvl_v2_2b_lora.py
  tessella convert ./lora-checkpoint ./split --to adapter             adapter in ./split, its base in ./split/base
  tessella convert runs/food ./food-gguf --to gguf                    model.gguf and mmproj.gguf for llama.cpp

OUT is reloaded and compared with IN: tensors bit by bit, or with the merge done again in float64; prompts and ids; logits
where a merge rounds and the model is at most 16 GiB in float32. A difference is an error, and OUT is not kept.
It takes little memory at any size. Stopped, it is gone on with by the same command. A folder that Tessella did not make is
never written over."""

VERIFY = """Are two folders the same model? Config, every tensor, prompts and ids, and logits where they tell more.

examples:
  tessella verify ./InternVL2-2B ./InternVL2-2B-hf                    two layouts of one model
  tessella verify runs/food ./InternVL2-2B-food                       an adapter and what it was merged into
  tessella verify tessella-nano ./nano-hf --engines transformers      and do others answer alike?
  tessella verify ./food ./food --engines vllm --engine-python vllm=/envs/vllm/bin/python

A and B are whatever convert takes, hub names too. Exit code 0: the same; 1: they differ; 2: one cannot be read."""

EVALUATE = """Score models side by side on the same questions, through the same prompts that taught them.

examples:
  tessella evaluate tessella-nano ./mine --data photos/ --held-out 0.1 --html report.html
  tessella evaluate ./base ./mine --data questions.jsonl --metric contains --json scores.json
  tessella evaluate tessella-nano --skills --data work/skills     made by recipes/nano/make_data.py --stage skills
  tessella evaluate ./base runs/food --recipe runs/food/recipe.toml     what that run held out

The first model is compared with each other one by McNemar's test; each score has a Wilson 95 % interval."""

INSPECT = """What the model will really see.

examples:
  tessella inspect dish.jpg --output tiles.png       its tiles, drawn, with the tokens they cost
  tessella inspect sivqa_llava.json                  lengths, tiles, what is learned, what is wrong
  tessella inspect photos/ --recipe foods.toml --forecast    packing, time and memory of that run
  tessella inspect ./InternVL2-2B                    parts, parameters, memory
  tessella inspect InternVL2-26B                     of a published model, before anything is fetched"""

RUNS = """Runs of finetune: a list, one of them, or two side by side.

examples:
  tessella runs                                      all below runs/, the newest last
  tessella runs experiments/                         all below another folder
  tessella runs runs/photos                          one: what it was told, before and after; writes its report.html anew
  tessella runs runs/a runs/b --html compared.html   two: what differs in their recipes, their curves and scores

A run that was killed is shown as far as it came; finetune RUN/recipe.toml --resume goes on with it."""

DEMO = """The whole story on foods the built-in model has never seen: ask, score, teach, convert, compare, and chat with both.

Foods in English and Chinese, drawn in four styles: three to learn from, one only to be tested on.
It takes 5 to 13 minutes on 2 CPU cores, by what these multiply in bfloat16 and what else they do. In a terminal it ends
with the web chat, where the model and what it learned answer side by side, until Ctrl-C; in a pipe it tells its command.

examples:
  tessella demo
  tessella demo --output runs/demo --json demo.json
  tessella demo --foods 12                           a short one"""

SERVE = """Serve a model over OpenAI's API: streaming, pictures, adapters by name, JSON that obeys a schema, metrics.

examples:
  tessella serve                                     tessella-nano on http://127.0.0.1:8000/v1, for this machine alone
  tessella serve ./InternVL2-2B --port 8001 --adapter food=runs/food     the model, and under the name food with its adapter
  tessella serve --ui                                the same, and the web chat that asks it
  tessella serve ./InternVL2-2B --host 0.0.0.0       for others too: they need the key that is made and printed

It stops on Ctrl-C or SIGTERM: what runs may end, nothing new is taken. docs/serve.md tells every flag, and how to run it
behind a proxy, under systemd and in a container. The keys may come from TESSELLA_API_KEY and TESSELLA_ADMIN_KEY."""

UI = """The web chat: a page that asks a server, with pictures, side by side if wanted.

examples:
  tessella ui                                        asks the server that tessella serve started on this machine
  tessella ui --server http://gpu-box:8000           another one; TESSELLA_API_KEY holds its key
  tessella ui --compare tessella-nano,foods          opens with two models side by side
  tessella ui --pictures dishes/                     dishes/KIND/*.jpg in the quick bar
  tessella ui --host 0.0.0.0 --port 7860             for others in the house, behind a password that is printed

It loads nothing from elsewhere, tells nobody, and opens no tunnel (--share would, and asks first)."""

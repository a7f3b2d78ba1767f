"""The scripts that `xscale completion` prints."""

from collections import defaultdict

from xscale_lightning.cli import COMMANDS
from xscale_lightning.commands.completion import FILES, TRAINING, Offer, quoted

HEAD = "# xscale completion {shell}: written by the command of this name; write it again after an upgrade."
# Class names after --model and --data and in the configurations given, between spaces.
CLASSES = r"""
_xscale_classes() {
  local i word found=" "
  for ((i = 2; i < COMP_CWORD; i++)); do
    word=${COMP_WORDS[i]}
    case $word in
      --model | --data | --model.class_path | --data.class_path) found+="${COMP_WORDS[i + 1]} " ;;
      -c | --config)
        word=${COMP_WORDS[i + 1]}
        [ -f "$word" ] && found+="$(sed -n 's/^ *\(model: *\)\{0,1\}class_path: *\([A-Za-z0-9_.]*\).*/\2/p' "$word" \
          | sed 's/.*\.//' | tr '\n' ' ') "
        ;;
    esac
  done
  printf '%s' "$found"
}
"""
BODY = r"""
_xscale() {
  local cur prev verb list found classes
  cur=${COMP_WORDS[COMP_CWORD]}
  prev=${COMP_WORDS[COMP_CWORD - 1]}
  verb=${COMP_WORDS[1]}
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W @VERBS@ -- "$cur"))
    return
  fi
  [ "$cur" = "=" ] && cur=""
  [ "$prev" = "=" ] && prev=${COMP_WORDS[COMP_CWORD - 2]}
  list=""
  case $prev in
@VALUES@
  esac
  [ "$verb" = completion ] && list="bash zsh fish"
  if [ -n "$list" ]; then
    COMPREPLY=($(compgen -W "$list" -- "$cur"))
    return
  fi
  case $prev in
    -c | --config)
      local IFS=$'\n'
      COMPREPLY=($(compgen -f -X '!*.yaml' -- "$cur") $(compgen -f -X '!*.yml' -- "$cur") $(compgen -d -S / -- "$cur"))
      compopt -o nospace -o filenames 2> /dev/null
      return
      ;;
  esac
  case $cur in
    -*) ;;
    *)
      local IFS=$'\n'
      COMPREPLY=($(compgen -f -- "$cur"))
      compopt -o filenames 2> /dev/null
      return
      ;;
  esac
  case $verb in
@OPTIONS@
  esac
  case $verb in
    @TRAINING@ | sweep | bench)
      classes=$(_xscale_classes)
@CLASSES@
      ;;
  esac
  case $cur in
    *.*) ;;
    *) list=$(printf '%s\n' $list | sed 's/\..*/./' | sort -u) ;; # sections first: --model., --trainer. ...
  esac
  COMPREPLY=($(compgen -W "$list" -- "$cur"))
  case "${#COMPREPLY[@]} ${COMPREPLY[*]}" in
    1\ *.) compopt -o nospace 2> /dev/null ;;
  esac
}
"""


def bash(offer: Offer, zsh: bool = False) -> str:
    """The script for bash; for zsh the same, by its layer for bash's completions."""
    by_words = defaultdict(list)
    for option, words in offer.values.items():
        by_words[quoted(words)].append(option)
    values = "\n".join(f"    {' | '.join(sorted(options))}) list={words} ;;" for words, options in by_words.items())
    by_options = defaultdict(list)
    for verb, options in offer.verbs.items():
        by_options[quoted(options)].append(verb)
    options = "\n".join(f"    {' | '.join(verbs)}) list={words} ;;" for words, verbs in by_options.items())
    body = BODY.replace("@VERBS@", quoted(COMMANDS)).replace("@VALUES@", values).replace("@OPTIONS@", options)
    body = body.replace("@TRAINING@", " | ".join(TRAINING)).replace("@CLASSES@", "\n".join(_class_lines(offer)))
    head = [HEAD.format(shell="zsh" if zsh else "bash")]
    if zsh:
        head += ["autoload -Uz compinit bashcompinit", "whence compdef > /dev/null || compinit", "bashcompinit"]
    return "\n".join([*head, CLASSES, body, "complete -F _xscale xscale"])


def _class_lines(offer: Offer) -> list[str]:
    """Options of the classes that are named; of all where none is."""
    lines = []
    for section, classes in offer.classes.items():
        lines.append(f'      found=""  # {section}')
        common = set.intersection(*(set(options) for options in classes.values()))
        every = dict.fromkeys(option for options in classes.values() for option in options)
        lines.append(f'      list+=" "{quoted(o for o in every if o in common)}')
        for names, options in classes.items():
            own = quoted(option for option in options if option not in common)
            pattern = " | ".join(f'*" {name} "* | *.{name}" "*' for name in names)
            lines.append(f'      case "$classes" in {pattern}) found=1 list+=" "{own} ;; esac')
        rest = quoted(option for option in every if option not in common)
        lines.append(f'      [ -z "$found" ] && list+=" "{rest}')
    return lines


def fish(offer: Offer) -> str:
    """The script for fish: options of all classes, with their values."""
    lines = [HEAD.format(shell="fish"), "complete -c xscale -n __fish_use_subcommand -f"]
    for verb, (_, text) in COMMANDS.items():
        lines.append(f"complete -c xscale -n __fish_use_subcommand -a {verb} -d {quoted([text])}")
    where: dict[str, list[str]] = defaultdict(list)
    for verb, options in offer.verbs.items():
        for option in options:
            where[option].append(verb)
    for classes in offer.classes.values():
        for option in dict.fromkeys(option for options in classes.values() for option in options):
            where[option] = list(dict.fromkeys([*where[option], *TRAINING]))
    for option, verbs in where.items():
        if not option.startswith("--"):
            continue
        seen = quoted([f"__fish_seen_subcommand_from {' '.join(verbs)}"])
        short = "-s c " if option == "--config" else ""
        words = offer.values.get(option)
        takes = f" -x -a {quoted(words)}" if words else " -r -F" if option in FILES else ""
        lines.append(f"complete -c xscale -n {seen} {short}-l {option[2:]}{takes}")
    return "\n".join(lines)

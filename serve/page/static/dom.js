// Making and changing elements. Text is always set as text.

export function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

/** Sets a node's text if it is another: what stays as it is costs nothing. */
export function setText(node, value) {
  const text = String(value);
  if (node.textContent !== text) node.textContent = text;
}

/** Name of a completion: its request, and which one of several it is. */
export function requestName(request) {
  return request.index ? `${request.id} #${request.index}` : request.id;
}

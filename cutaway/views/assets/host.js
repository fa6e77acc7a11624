/* on the frame, once it is loaded: fits its height, and tells it the colour of the text around it, now and later */
if (!this.fit) {
  this.fit = ({ source, data }) => {
    if (!this.isConnected) window.removeEventListener('message', this.fit);
    else if (source === this.contentWindow && data > 0) this.style.height = data + 'px';
  };
  window.addEventListener('message', this.fit);
  for (const name of ['transitionend', 'transitioncancel']) this.addEventListener(name, this.onload); /* a theme was chosen */
}
this.contentWindow.postMessage(getComputedStyle(this).color, '*');
